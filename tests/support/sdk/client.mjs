// One client of OpenAI's JavaScript SDK for many tests: each line on stdin is a call, each line on stdout its outcome.
// What a call and an outcome hold is said in tests/support/openai_sdks.py.
import { createReadStream } from "node:fs";
import { createInterface } from "node:readline";
import OpenAI from "openai";

const messages = [{ role: "user", content: "Hi" }];

const operations = {
  chat: async (client, { model, words }, options) =>
    (
      await client.chat.completions.create(
        { model, messages: words ? [{ role: "user", content: words }] : messages },
        options,
      )
    ).choices[0].message.content,
  stream: async (client, { model }, options) => {
    const pieces = [];
    for await (const chunk of await client.chat.completions.create({ model, messages, stream: true }, options)) {
      pieces.push(chunk.choices[0]?.delta?.content ?? "");
    }
    return pieces.join("");
  },
  complete: async (client, { model }, options) => (await client.completions.create({ model, prompt: "Hi" }, options)).choices[0].text,
  respond: async (client, { model }, options) => (await client.responses.create({ model, input: "Hi" }, options)).output_text,
  embed: async (client, { model }, options) =>
    (await client.embeddings.create({ model, input: "Hi", encoding_format: "float" }, options)).data[0].embedding.join(" "),
  transcribe: async (client, { model, file }, options) =>
    (await client.audio.transcriptions.create({ model, file: createReadStream(file) }, options)).text,
  models: async (client, _, options) => {
    const names = [];
    for await (const model of client.models.list(options)) names.push(model.id);
    return names.join(" ");
  },
  retrieve: async (client, { model }, options) => (await client.models.retrieve(model, options)).id,
};

for await (const line of createInterface({ input: process.stdin })) {
  const call = JSON.parse(line);
  const client = new OpenAI({
    baseURL: call.base_url,
    apiKey: call.api_key,
    maxRetries: call.max_retries,
    timeout: call.timeout_s * 1000,
  });
  let outcome;
  try {
    outcome = { text: await operations[call.operation](client, call, { headers: call.headers }) };
  } catch (error) {
    outcome = {
      error: error.constructor.name,
      detail: error.message,
      status: error.status ?? 0,
      code: error.code ?? "",
      request_id: error.requestID ?? "",
    };
  }
  process.stdout.write(JSON.stringify(outcome) + "\n");
}
