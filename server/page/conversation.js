// The conversation as data: what was said, how it is kept over a reload, and how it is sent.
//
// A message is {role: "user" | "assistant", content} and, of the assistant, also {reasoning, calls, tokens, error,
// stopped, finish, usage, seconds, firstToken, reasoningSeconds, model}; a call is {id, name, arguments, result}.

const KEY = "jax-engine-conversation";
const SAVE_MS = 1000;

export class Conversation {
  constructor() {
    this.messages = load();
    this.saving = null;
  }

  add(message) {
    this.messages.push(message);
    this.save();
    return message;
  }

  /** Drop the message at `index` and all that follow. */
  cut(index) {
    this.messages.length = index;
    this.save();
  }

  clear() {
    this.cut(0);
  }

  /** Write to storage soon; often called while an answer grows. */
  save() {
    this.saving ??= setTimeout(() => this.saveNow(), SAVE_MS);
  }

  /** Write what `save` has put off; nothing else, since another tab may have written meanwhile. */
  flush() {
    if (this.saving !== null) this.saveNow();
  }

  saveNow() {
    clearTimeout(this.saving);
    this.saving = null;
    // Log-probabilities are many times the text, and of interest right after it.
    const kept = this.messages.map((message) => ({ ...message, tokens: undefined }));
    try {
      if (kept.length) localStorage.setItem(KEY, JSON.stringify(kept));
      else localStorage.removeItem(KEY);
    } catch {
      // Storage is full or forbidden: the conversation lasts as long as the page.
    }
  }

  /** The messages of a request. */
  forServer(system) {
    const sent = system.trim() ? [{ role: "system", content: system }] : [];
    for (const message of this.messages) {
      if (message.role === "user") sent.push({ role: "user", content: message.content });
      else sent.push(...answerForServer(message));
    }
    return sent;
  }
}

function answerForServer(message) {
  if (!message.calls.length) return message.content ? [{ role: "assistant", content: message.content }] : [];
  const calls = message.calls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments || "{}" },
  }));
  const results = message.calls
    .filter((call) => call.result !== null)
    .map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result }));
  return [{ role: "assistant", content: message.content || null, tool_calls: calls }, ...results];
}

export function newAnswer(model) {
  return { role: "assistant", content: "", reasoning: "", calls: [], tokens: [], model };
}

/** Add what a chunk brings to a message. */
export function takeChunk(message, chunk) {
  if (chunk.usage) message.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  message.content += delta.content ?? "";
  message.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const part of delta.tool_calls ?? []) takeCall(message.calls, part);
  for (const token of choice.logprobs?.content ?? []) message.tokens.push(token);
  if (choice.finish_reason) message.finish = choice.finish_reason;
}

function takeCall(calls, part) {
  const call = (calls[part.index] ??= { id: "", name: "", arguments: "", result: null });
  if (part.id) call.id = part.id;
  call.name += part.function?.name ?? "";
  call.arguments += part.function?.arguments ?? "";
}

/**
 * {reasoning, answer, isOpen}: what the server took apart, or else what stands between <think> and </think>, where the
 * server knows of no reasoning. `isOpen`: it has not ended.
 */
export function parts(message) {
  if (message.reasoning) {
    return { reasoning: message.reasoning, answer: message.content, isOpen: !message.content && !message.calls.length };
  }
  const text = message.content;
  const end = text.indexOf("</think>");
  if (end >= 0) {
    const reasoning = text.slice(0, end).replace(/^\s*<think>/, "");
    return { reasoning: reasoning.trim(), answer: text.slice(end + "</think>".length).trimStart(), isOpen: false };
  }
  const begin = /^\s*<think>/.exec(text);
  if (begin) return { reasoning: text.slice(begin[0].length).trimStart(), answer: "", isOpen: true };
  return { reasoning: "", answer: text, isOpen: false };
}

function load() {
  try {
    const messages = JSON.parse(localStorage.getItem(KEY)) ?? [];
    return messages.map((message) => (message.role === "assistant" ? { ...newAnswer(null), ...message } : message));
  } catch {
    return [];
  }
}
