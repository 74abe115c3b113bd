// `openai` for Node against a server: `client_openai.mjs URL`.

import assert from "node:assert/strict";

import OpenAI, { UnprocessableEntityError } from "openai";

import { collect, kept, MESSAGES, PROMPT, refused } from "./promises.mjs";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model: "tgi", max_tokens: 8, temperature: 0, ignore_eos: true };

await kept("models", async () => {
  const listed = await collect(client.models.list());
  assert.equal(listed.length, 1);
});

const said = await kept("chat", async () => {
  const answer = await client.chat.completions.create({ ...asked, messages: MESSAGES });
  const [choice] = answer.choices;
  assert.equal(choice.finish_reason, "length");
  assert.equal(answer.usage.completion_tokens, 8);
  return choice.message.content;
});

await kept("chat_stream", async () => {
  const stream = client.chat.completions.stream({
    ...asked,
    messages: MESSAGES,
    stream_options: { include_usage: true },
  });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(text, said);
  assert.equal(final.choices[0].message.content, said);
  assert.equal((await stream.totalUsage()).completion_tokens, 8);
});

await kept("chat_leaves_early", async () => {
  const stream = await client.chat.completions.create({
    ...asked,
    messages: MESSAGES,
    max_tokens: 60,
    stream: true,
  });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta.content) break;
  }
});

await kept("completions", async () => {
  const answer = await client.completions.create({ ...asked, prompt: PROMPT, logprobs: 2 });
  assert.equal(answer.choices[0].finish_reason, "length");
  assert.equal(answer.choices[0].logprobs.tokens.length, 8);
});

await kept("errors", async () => {
  const error = await refused(() =>
    client.chat.completions.create({ ...asked, messages: MESSAGES, frequency_penalty: 9 }),
  );
  assert.ok(error instanceof UnprocessableEntityError);
  assert.match(error.message, /frequency_penalty/);
});
