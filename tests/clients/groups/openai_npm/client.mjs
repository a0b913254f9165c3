// The openai package of npm: runTools, parsed calls and streams.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "x", maxRetries: 0 });
const messages = [{ role: "user", content: "Is it warm in Ulm?" }];
const model = "small";
const tool = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a city.",
    parse: JSON.parse,
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    function: ({ city }) => `21 degrees in ${city}`,
  },
};

for (const stream of [false, true]) {
  const runner = client.chat.completions.runTools({ model, messages, tools: [tool], stream }, { maxChatCompletions: 4 });
  assert.match(await runner.finalContent(), /21/);
  const roles = runner.messages.map((message) => message.role);
  assert.deepEqual(roles, ["user", "assistant", "tool", "assistant"]);
}

const weather = zodFunction({ name: "weather", parameters: z.object({ city: z.enum(["Ulm", "Bonn"]) }) });
const parsed = await client.chat.completions.parse({ model, messages, tools: [weather], tool_choice: "required" });
const [call] = parsed.choices[0].message.tool_calls;
assert.ok(["Ulm", "Bonn"].includes(call.function.parsed_arguments.city));

const names = [];
for await (const chunk of await client.chat.completions.create({ model, messages, tools: [weather], stream: true }))
  for (const part of chunk.choices[0]?.delta.tool_calls ?? []) if (part.function.name) names.push(part.function.name);
assert.deepEqual(names, ["weather"]);

// The Responses API.
const flat = { type: "function", name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } };
const response = await client.responses.create({ model: "small", input: "Is it warm in Ulm?", tools: [flat] });
assert.deepEqual(response.output.map((item) => item.type), ["message", "function_call"]);
const result = { type: "function_call_output", call_id: response.output[1].call_id, output: "21" };
const input = [{ role: "user", content: "Is it warm in Ulm?" }, ...response.output, result];
assert.match((await client.responses.create({ model: "small", input, tools: [flat] })).output_text, /21/);
const events = client.responses.stream({ model: "small", input: "think" });
assert.equal((await events.finalResponse()).output_text, "Yes.");
