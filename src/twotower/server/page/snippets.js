// The request of the current settings as a curl command and as a Python program.

import { key } from "./api.js";

const OPENAI_FIELDS = ["prompt", "max_tokens", "temperature", "seed"]; // other fields go into extra_body

export function curl(request, origin) {
  const lines = [`curl -s ${origin}v1/completions`, `-H 'Content-Type: application/json'`];
  if (key.get()) lines.push(`-H "Authorization: Bearer $TWOTOWER_API_KEY"`);
  lines.push(`-d '${JSON.stringify(request).replaceAll("'", `'\\''`)}'`);
  return lines.join(" \\\n  ");
}

export function python(request, origin, model) {
  const standard = OPENAI_FIELDS.filter((name) => name in request);
  const extra = Object.entries(request).filter(([name]) => !OPENAI_FIELDS.includes(name));
  const secret = key.get() ? `os.environ["TWOTOWER_API_KEY"]` : `"none"`;
  return [
    ...(key.get() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${origin}v1", api_key=${secret})`,
    "answer = client.completions.create(",
    `    model=${JSON.stringify(model)},`,
    ...standard.map((name) => `    ${name}=${JSON.stringify(request[name])},`),
    `    extra_body={${extra.map(([name, value]) => `"${name}": ${JSON.stringify(value)}`).join(", ")}},`,
    ")",
    "print(answer.choices[0].text)",
  ].join("\n");
}

/** Copies an element's text; where the browser forbids the clipboard API (http, other hosts), through a selection. */
export async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}
