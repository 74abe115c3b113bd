// What the clients' scripts share: each promise is a function, and a line when it is kept.

import assert from "node:assert/strict";

export const PROMPT = "the river runs";
export const MESSAGES = [{ role: "user", content: "what is a river?" }];

// Runs one promise and says so; a failed assertion ends the script.
export async function kept(name, promise) {
  const result = await promise();
  console.log(`ok ${name}`);
  return result;
}

// The error that `call` is refused with.
export async function refused(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
  assert.fail("not refused");
}

export async function collect(items) {
  const found = [];
  for await (const item of items) found.push(item);
  return found;
}
