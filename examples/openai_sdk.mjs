// Calls a relay with OpenAI's SDK for JavaScript: a chat completion, a stream, and what to do when credits run out.
//
//     make run                  # in another terminal; or set RELAY_URL to a relay of yours
//     npm install openai
//     node openai_sdk.mjs
import OpenAI from "openai";

const installId = process.env.INSTALL_ID ?? "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11"; // a UUID that your app keeps

const client = new OpenAI({
  baseURL: `${process.env.RELAY_URL ?? "http://127.0.0.1:8080"}/v1`,
  apiKey: process.env.LICENCE ?? installId, // a licence, or without one the install id
  defaultHeaders: { "X-Install-Id": installId },
  maxRetries: 2, // a 429 is retried after its Retry-After; a 402 never is
});

try {
  const { data, response } = await client.chat.completions
    .create({ model: "echo", messages: [{ role: "user", content: "Hello, relay" }] })
    .withResponse();
  console.log(data.choices[0].message.content);
  console.log("credits:", response.headers.get("RateLimit"));

  const pieces = [];
  for await (const chunk of await client.chat.completions.create({
    model: "echo",
    messages: [{ role: "user", content: "Hello, stream" }],
    stream: true,
  })) {
    pieces.push(chunk.choices[0]?.delta?.content ?? "");
  }
  console.log(pieces.join(""));
} catch (error) {
  if (error instanceof OpenAI.RateLimitError) {
    // 429: still so after the retries, e.g. many requests of this install run
    console.error(`busy (${error.code}), try again in ${error.headers.get("Retry-After")} s`);
  } else if (error instanceof OpenAI.APIError && error.status === 402) {
    console.error(`out of credits (${error.code}): ${error.message}`);
  } else {
    throw error;
  }
  process.exitCode = 1;
}
