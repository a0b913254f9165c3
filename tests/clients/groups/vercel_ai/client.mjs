// Vercel's AI SDK with its provider for compatible servers: generateText and streamText with tools, and reasoning.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({ name: "twotower", baseURL: process.argv[2], apiKey: "x" });
const model = provider("small");
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `21 degrees in ${city}`,
});
const common = { model, tools: { weather }, stopWhen: stepCountIs(4), maxRetries: 0 };

const whole = await generateText({ ...common, prompt: "Is it warm in Ulm?" });
assert.equal(whole.steps.length, 2);
assert.equal(whole.steps[0].finishReason, "tool-calls");
assert.match(whole.text, /21/);

const streamed = streamText({ ...common, prompt: "Is it warm in Ulm?" });
assert.match(await streamed.text, /21/);
assert.equal((await streamed.steps).length, 2);

const city = z.object({ city: z.enum(["Ulm", "Bonn"]) });
const forced = await generateText({
  model,
  tools: { weather: tool({ inputSchema: city }) },
  toolChoice: "required",
  maxRetries: 0,
  prompt: "Is it warm in Ulm?",
});
assert.equal(forced.toolCalls[0].toolName, "weather");
assert.ok(["Ulm", "Bonn"].includes(forced.toolCalls[0].input.city));

const thought = await generateText({ model, maxRetries: 0, prompt: "think" });
assert.equal(thought.reasoningText, "Ulm is a city.");
assert.equal(thought.text, "Yes.");
