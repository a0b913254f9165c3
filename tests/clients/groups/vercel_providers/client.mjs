// Vercel's AI SDK with its providers for OpenAI (its default route, the Responses API) and for Anthropic.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const openai = createOpenAI({ baseURL, apiKey: "x" });
const anthropic = createAnthropic({ baseURL, apiKey: "x" });
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `21 degrees in ${city}`,
});
const prompt = "Is it warm in Ulm?";
const city = z.object({ city: z.enum(["Ulm", "Bonn"]) });
// Without store: false, the SDK of OpenAI refers to earlier texts by their ids, and the server keeps nothing.
const stateless = { providerOptions: { openai: { store: false } } };

for (const model of [openai("small"), anthropic("small")]) {
  const common = { model, tools: { weather }, stopWhen: stepCountIs(4), maxRetries: 0, ...stateless };
  const whole = await generateText({ ...common, prompt });
  assert.equal(whole.steps.length, 2);
  assert.equal(whole.steps[0].finishReason, "tool-calls");
  assert.match(whole.text, /21/);
  assert.ok(whole.totalUsage.inputTokens > 0 && whole.totalUsage.outputTokens > 0);

  const streamed = streamText({ ...common, prompt });
  assert.match(await streamed.text, /21/);
  assert.equal((await streamed.steps).length, 2);

  const forced = await generateText({
    model, tools: { weather: tool({ inputSchema: city }) }, toolChoice: "required", maxRetries: 0, prompt,
  });
  assert.ok(["Ulm", "Bonn"].includes(forced.toolCalls[0].input.city));

  const object = await generateObject({ model, schema: city, maxRetries: 0, prompt });
  assert.ok(["Ulm", "Bonn"].includes(object.object.city));

  const plain = await generateText({ model, maxRetries: 0, prompt: "think" });
  assert.equal(plain.text, "Yes.");
}

// The reasoning is a summary if the request asks for one.
const openaiOptions = { forceReasoning: true, reasoningSummary: "auto", store: false };
const thinking = { model: openai("small"), maxRetries: 0, prompt: "think", providerOptions: { openai: openaiOptions } };
assert.equal((await generateText(thinking)).reasoningText, "Ulm is a city.");
assert.equal(await streamText(thinking).reasoningText, "Ulm is a city.");
const thought = await generateText({ model: anthropic("small"), maxRetries: 0, prompt: "think" });
assert.equal(thought.reasoningText, "Ulm is a city.");

// What the server does not keep is refused by name.
const refused = generateText({
  model: openai("small"), tools: { weather }, stopWhen: stepCountIs(4), maxRetries: 0, prompt,
});
await assert.rejects(refused, /item_reference/);
