// `@huggingface/inference` against a server: `client_inference.mjs URL`.

import assert from "node:assert/strict";

import { InferenceClient } from "@huggingface/inference";

import { collect, kept, MESSAGES, PROMPT, refused } from "./promises.mjs";

const url = process.argv[2];
const client = new InferenceClient().endpoint(url);
// The package sends this to /v1/completions, which samples unless told otherwise.
const parameters = { max_new_tokens: 8, return_full_text: false, temperature: 0.7, seed: 7 };
const asked = { inputs: PROMPT, parameters };

const whole = await kept("text_generation", async () => {
  const answer = await client.textGeneration(asked);
  assert.ok(answer.generated_text.length > 0);
  return answer.generated_text;
});

await kept("text_stream", async () => {
  const chunks = await collect(client.textGenerationStream(asked));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole);
  assert.equal(chunks.at(-1).choices[0].finish_reason, "length");
  assert.equal(chunks.at(-1).usage.completion_tokens, 8);
});

const said = await kept("chat", async () => {
  const answer = await client.chatCompletion({ messages: MESSAGES, max_tokens: 8, temperature: 0 });
  const [choice] = answer.choices;
  assert.equal(choice.message.role, "assistant");
  assert.ok(["length", "stop"].includes(choice.finish_reason));
  assert.ok(answer.usage.completion_tokens <= 8);
  return choice.message.content;
});

await kept("chat_stream", async () => {
  const chunks = await collect(
    client.chatCompletionStream({ messages: MESSAGES, max_tokens: 8, temperature: 0 }),
  );
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, said);
});

await kept("errors", async () => {
  const wrong = { inputs: PROMPT, parameters: { max_new_tokens: 0 } };
  const error = await refused(() => client.textGeneration(wrong));
  assert.match(JSON.stringify(error, Object.getOwnPropertyNames(error)), /max_tokens/);
});
