// The request for the current settings, as a command and as a program.

import { key } from "./api.js";

const BASE = ["prompt", "max_tokens", "temperature", "seed"]; // the published API's own; the rest goes beside it

export function curl(asked, origin) {
  const lines = [`curl -s ${origin}v1/completions`, `-H 'Content-Type: application/json'`];
  if (key.get()) lines.push(`-H "Authorization: Bearer $TWOTOWER_API_KEY"`);
  lines.push(`-d '${JSON.stringify(asked).replaceAll("'", `'\\''`)}'`);
  return lines.join(" \\\n  ");
}

export function python(asked, origin, model) {
  const own = BASE.filter((name) => name in asked).map((name) => `    ${name}=${JSON.stringify(asked[name])},`);
  const rest = Object.entries(asked).filter(([name]) => !BASE.includes(name));
  const secret = key.get() ? `os.environ["TWOTOWER_API_KEY"]` : `"none"`;
  return [
    ...(key.get() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${origin}v1", api_key=${secret})`,
    "answer = client.completions.create(",
    `    model=${JSON.stringify(model)},`,
    ...own,
    `    extra_body={${rest.map(([name, value]) => `"${name}": ${JSON.stringify(value)}`).join(", ")}},`,
    ")",
    "print(answer.choices[0].text)",
  ].join("\n");
}

/** Into the clipboard; where the browser forbids that (pages that are not on this machine), by selecting it. */
export async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}
