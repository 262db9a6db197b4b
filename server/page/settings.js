// System prompt, sampling, tools and the key: a form, kept over a reload (but for the key), and what of it is sent.

import { apiKey } from "./api.js";
import { h } from "./dom.js";

const KEY = "jax-engine-settings";
// Left empty, the model's own default counts.
const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["max_completion_tokens", "Max tokens", { min: 1, step: 1 }],
  ["top_p", "Top p", { min: 0, max: 1, step: 0.05 }],
  ["top_k", "Top k", { min: 0, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.05 }],
  ["seed", "Seed", { step: 1 }],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1 }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.1, max: 2, step: 0.05 }],
];
const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the weather in a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const TOP_LOGPROBS = 5;

export class Settings {
  constructor(form) {
    this.form = form;
    const numbers = form.querySelector("#sampling");
    for (const [name, label, range] of NUMBERS) numbers.append(numberField(name, label, range));
    this.restore();
    form.elements.api_key.value = apiKey.get();
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => this.changed());
    form.querySelector("#reset-settings").addEventListener("click", () => this.reset());
    form.querySelector("#example-tools").addEventListener("click", () => {
      form.elements.tools.value = JSON.stringify(EXAMPLE_TOOLS, null, 2);
      this.changed();
    });
    this.showToolsError();
  }

  get system() {
    return this.form.elements.system.value;
  }

  get wantsTokens() {
    return this.form.elements.logprobs.checked;
  }

  /** The fields of a request besides model and messages. Throws an Error that names a mistake in the tools. */
  fields() {
    const fields = {};
    for (const [name] of NUMBERS) {
      const { value, valueAsNumber } = this.form.elements[name];
      if (value !== "") fields[name] = valueAsNumber;
    }
    const stop = this.form.elements.stop.value.split("\n").filter(Boolean);
    if (stop.length) fields.stop = stop;
    if (this.wantsTokens) Object.assign(fields, { logprobs: true, top_logprobs: TOP_LOGPROBS });
    const tools = this.tools();
    if (tools.length) Object.assign(fields, { tools, tool_choice: this.form.elements.tool_choice.value });
    return fields;
  }

  tools() {
    const text = this.form.elements.tools.value.trim();
    if (!text) return [];
    let tools;
    try {
      tools = JSON.parse(text);
    } catch (error) {
      throw new Error(`The tools are not valid JSON: ${error.message}`);
    }
    if (!Array.isArray(tools)) tools = [tools];
    // A bare function is meant as a tool.
    return tools.map((tool) => (tool && !tool.type && tool.name ? { type: "function", function: tool } : tool));
  }

  changed() {
    apiKey.set(this.form.elements.api_key.value.trim());
    this.showToolsError();
    const kept = {};
    for (const field of this.form.elements) {
      if (!field.name || field.name === "api_key") continue;
      kept[field.name] = field.type === "checkbox" ? field.checked : field.value;
    }
    try {
      localStorage.setItem(KEY, JSON.stringify(kept));
    } catch {
      // They last as long as the page.
    }
  }

  showToolsError() {
    const { tools } = this.form.elements;
    let message = "";
    try {
      this.tools();
    } catch (error) {
      message = error.message;
    }
    tools.setAttribute("aria-invalid", String(Boolean(message)));
    this.form.querySelector("#tools-error").textContent = message;
  }

  reset() {
    const key = this.form.elements.api_key.value;
    this.form.reset();
    this.form.elements.api_key.value = key;
    this.changed();
  }

  restore() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      // Someone else's, or half written.
    }
    for (const [name, value] of Object.entries(kept)) {
      const field = this.form.elements[name];
      if (field?.type === "checkbox") field.checked = value;
      else if (field) field.value = value;
    }
  }
}

function numberField(name, label, { min = null, max = null, step }) {
  const id = `setting-${name}`;
  // "any" and not the step: 0.33 is as good a temperature as 0.3.
  const input = h("input", { id, name, type: "number", min, max, step: step === 1 ? 1 : "any", placeholder: "default" });
  return h("div", { class: "field" }, h("label", { for: id }, label), input);
}
