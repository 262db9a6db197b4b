// Markdown as chat models write it -> elements: paragraphs, headings, lists, tables, quotes, code, links, emphasis.
// HTML in it stays text. Every scan goes forward only, so that no text takes more than about linear time.

import { copyButton, h } from "./dom.js";

const MAX_DEPTH = 8; // of quotes and lists within each other, and of emphasis
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DIVIDER = /^ {0,3}\|?(?:[ \t]*:?-+:?[ \t]*\|)*[ \t]*:?-+:?[ \t]*\|?[ \t]*$/;

/**
 * Show `source` in `container`. Blocks that have not changed since the last call keep their elements, and with them the
 * reader's selection: of a growing text only the last block is made anew.
 */
export function renderMarkdown(container, source, announce = () => {}) {
  const blocks = splitBlocks(source.split("\n"));
  const old = container.markdownBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < old.length && blocks[same].key === old[same]) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(element(block, 0, announce));
  container.markdownBlocks = blocks.map((block) => block.key);
}

/** Lines -> blocks: {kind, lines, ...}; `key` tells whether a block is the same as another. */
function splitBlocks(lines) {
  const blocks = [];
  let at = 0;
  const push = (kind, end, more = {}) => {
    const taken = lines.slice(at, end);
    blocks.push({ kind, lines: taken, key: `${kind}\n${taken.join("\n")}\n${more.closed ?? ""}`, ...more });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      const end = endOfFence(lines, at + 1, fence[1]);
      push("code", Math.min(end + 1, lines.length), { language: fence[2], closed: end < lines.length });
    } else if (HEADING.test(line)) push("heading", at + 1);
    else if (RULE.test(line)) push("rule", at + 1);
    else if (QUOTE.test(line)) push("quote", endOfRun(lines, at, (next) => QUOTE.test(next)));
    else if (ITEM.test(line)) push("list", endOfList(lines, at));
    else if (isTable(lines, at)) push("table", endOfRun(lines, at, (next) => next.includes("|")));
    else push("paragraph", endOfRun(lines, at + 1, (next, index) => !beginsBlock(lines, next, index)));
  }
  return blocks;
}

function endOfFence(lines, from, mark) {
  let end = from;
  while (end < lines.length) {
    const line = lines[end].trim();
    if (line.startsWith(mark) && !line.replaceAll(mark[0], "").trim()) return end;
    end++;
  }
  return end;
}

function endOfRun(lines, from, goesOn) {
  let end = from;
  while (end < lines.length && lines[end].trim() && goesOn(lines[end], end)) end++;
  return end;
}

function beginsBlock(lines, line, index) {
  const item = ITEM.exec(line);
  // "1986. A good year" in the midst of a paragraph begins no list.
  const list = item && (!/\d/.test(item[2]) || /^1[.)]$/.test(item[2]));
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || list || isTable(lines, index);
}

function isTable(lines, at) {
  return lines[at].includes("|") && lines[at + 1]?.includes("-") && DIVIDER.test(lines[at + 1]);
}

/** A list goes on over indented lines and further items, and over a blank line if one of these follows. */
function endOfList(lines, from) {
  let end = from + 1;
  while (end < lines.length) {
    const line = lines[end];
    if (line.trim()) {
      if (!ITEM.test(line) && !/^ {2}|^\t/.test(line) && (!lines[end - 1].trim() || beginsBlock(lines, line, end))) break;
    } else if (!lines[end + 1] || !(ITEM.test(lines[end + 1]) || /^ {2}/.test(lines[end + 1]))) break;
    end++;
  }
  return end;
}

function element(block, depth, announce) {
  const text = block.lines.join("\n");
  switch (block.kind) {
    case "code":
      return codeBlock(block, announce);
    case "heading": {
      const [, marks, title] = HEADING.exec(block.lines[0]);
      // The page's own headings are of the first and second level.
      return h(`h${Math.min(marks.length + 2, 6)}`, {}, inline(title.replace(/[ \t]+#+[ \t]*$/, "")));
    }
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, nested(block.lines.map((line) => line.replace(QUOTE, "")), depth, announce));
    case "list":
      return list(block.lines, depth, announce);
    case "table":
      return table(block.lines);
    default:
      return h("p", {}, inline(text.trim()));
  }
}

function nested(lines, depth, announce) {
  if (depth >= MAX_DEPTH) return [lines.join("\n")];
  return splitBlocks(lines).map((block) => element(block, depth + 1, announce));
}

function codeBlock(block, announce) {
  const lines = block.lines.slice(1, block.closed ? -1 : undefined);
  const text = lines.join("\n");
  const label = block.language || "text";
  return h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, label), copyButton("Copy code", () => text, announce)),
    // Focusable, so that what is wider than the page can be scrolled by keyboard.
    h("pre", { tabindex: "0", role: "group", "aria-label": `Code: ${label}` }, h("code", {}, text)),
  );
}

function list(lines, depth, announce) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    const isOwn = item && item[1].length <= first[1].length + 1;
    if (isOwn || !items.length) items.push({ indent: item[0].length, lines: [line.slice(item[0].length)] });
    else {
      const { indent, lines: own } = items.at(-1);
      const blanks = line.length - line.trimStart().length;
      own.push(line.slice(Math.min(blanks, indent)));
    }
  }
  const loose = items.some((item) => item.lines.some((line, index) => !line.trim() && index < item.lines.length - 1));
  const children = items.map((item) => h("li", {}, listItem(item.lines, loose, depth, announce)));
  const start = ordered ? Number.parseInt(first[2], 10) : 1;
  return h(ordered ? "ol" : "ul", start === 1 ? {} : { start }, children);
}

function listItem(lines, loose, depth, announce) {
  const task = /^\[([ xX])\][ \t]+/.exec(lines[0]);
  if (task) lines = [lines[0].slice(task[0].length), ...lines.slice(1)];
  const children = nested(lines, depth, announce).flatMap((child) =>
    // A tight list's items are lines, not paragraphs.
    !loose && child.tagName === "P" ? [...child.childNodes] : [child],
  );
  return task ? [h("span", { class: "task" }, task[1] === " " ? "☐ " : "☑ "), ...children] : children;
}

function table(lines) {
  const [head, divider, ...rows] = lines.map(cells);
  const alignment = divider.map((cell) => (/^:-+:$/.test(cell) ? "center" : /-:$/.test(cell) ? "right" : "left"));
  const row = (tag, own) =>
    h("tr", {}, head.map((_, index) => h(tag, { class: `align-${alignment[index] ?? "left"}` }, inline(own[index] ?? ""))));
  const body = h("tbody", {}, rows.map((own) => row("td", own)));
  const wide = { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" };
  return h("div", wide, h("table", {}, h("thead", {}, row("th", head)), body));
}

/** The cells of a table's line; a bar behind a backslash or within `code` is none. */
function cells(line) {
  const found = [""];
  let inCode = false;
  for (let at = 0; at < line.length; at++) {
    if (line[at] === "\\" && line[at + 1] === "|") found[found.length - 1] += line[++at];
    else if (line[at] === "|" && !inCode) found.push("");
    else {
      if (line[at] === "`") inCode = !inCode;
      found[found.length - 1] += line[at];
    }
  }
  const trimmed = found.map((cell) => cell.trim());
  if (trimmed[0] === "") trimmed.shift();
  if (trimmed.at(-1) === "") trimmed.pop();
  return trimmed;
}

const MARKS = [
  ["***", (children) => h("strong", {}, h("em", {}, children))],
  ["**", (children) => h("strong", {}, children)],
  ["__", (children) => h("strong", {}, children)],
  ["~~", (children) => h("del", {}, children)],
  ["*", (children) => h("em", {}, children)],
  ["_", (children) => h("em", {}, children)],
];
const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const WORD = /[\p{L}\p{N}]/u;

/** Text with inline marks -> nodes. */
function inline(text, depth = 0) {
  if (depth > MAX_DEPTH) return [text];
  const nodes = [];
  const missing = new Set(); // marks that have no end further on: not looked for again
  let plain = 0;
  let at = 0;
  const take = (node, end) => {
    if (at > plain) nodes.push(text.slice(plain, at));
    nodes.push(node);
    plain = at = end;
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text);
    if (!next) break;
    at = next.index;
    const found = inlineAt(text, at, depth, missing);
    if (found) take(...found);
    else at += next[0].length;
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

/** [node, end] of what begins at a special character, or null when it is only a character. */
function inlineAt(text, at, depth, missing) {
  const character = text[at];
  if (character === "\n") return [h("br"), at + 1];
  if (character === "\\") return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? [text[at + 1], at + 2] : null;
  if (character === "`") return code(text, at, missing);
  if (character === "h" || character === "<") return autolink(text, at);
  if (character === "[" || character === "!") return link(text, at, depth);
  for (const [mark, wrap] of MARKS) {
    if (!text.startsWith(mark, at)) continue;
    const end = missing.has(mark) ? -1 : endOfMark(text, at, mark, missing);
    if (end > 0) return [wrap(inline(text.slice(at + mark.length, end), depth + 1)), end + mark.length];
  }
  return null;
}

function code(text, at, missing) {
  const ticks = /^`+/.exec(text.slice(at, at + 20))[0];
  if (missing.has(ticks)) return null;
  let end = text.indexOf(ticks, at + ticks.length);
  while (end >= 0 && (text[end + ticks.length] === "`" || text[end - 1] === "`")) {
    end += 1;
    while (text[end] === "`") end++;
    end = text.indexOf(ticks, end);
  }
  if (end < 0) {
    missing.add(ticks);
    return null;
  }
  const inside = text.slice(at + ticks.length, end).replaceAll("\n", " ");
  const padded = inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
  return [h("code", {}, padded ? inside.slice(1, -1) : inside), end + ticks.length];
}

function endOfMark(text, at, mark, missing) {
  const isWord = (character) => character !== undefined && WORD.test(character);
  if (/\s/.test(text[at + mark.length] ?? " ")) return -1;
  if (mark[0] === "_" && isWord(text[at - 1])) return -1; // snake_case
  let end = text.indexOf(mark, at + mark.length + 1);
  for (; end >= 0; end = text.indexOf(mark, end + 1)) {
    if (/[\s\\]/.test(text[end - 1])) continue;
    if (mark[0] === "_" && isWord(text[end + mark.length])) continue;
    if (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark)) continue;
    return end;
  }
  missing.add(mark);
  return -1;
}

function autolink(text, at) {
  const bracketed = text[at] === "<";
  const match = /^https?:\/\/[^\s<>"`]+/.exec(text.slice(at + bracketed, at + 2000));
  if (!match) return null;
  if (bracketed) {
    const end = at + 1 + match[0].length;
    return text[end] === ">" ? [anchor(match[0], [match[0]]), end + 1] : null;
  }
  const address = match[0].replace(/[.,;:!?)\]}'*_~]+$/, "");
  return [anchor(address, [address]), at + address.length];
}

/** [text](address), and ![text](address) as a link too: the page loads nothing from elsewhere. */
function link(text, at, depth) {
  const open = text[at] === "!" ? at + 1 : at;
  if (text[open] !== "[") return null;
  const length = text.slice(open, open + 1000).indexOf("](");
  if (length < 0) return null;
  const close = open + length;
  const match = /^\]\(\s*<?([^\s<>]*?)>?(?:\s+["'(][^\n]*?["')])?\s*\)/.exec(text.slice(close, close + 2000));
  if (!match) return null;
  const label = text.slice(open + 1, close);
  const address = safeAddress(match[1]);
  const children = inline(label || match[1], depth + 1);
  return [address ? anchor(address, children) : h("span", {}, children), close + match[0].length];
}

function safeAddress(address) {
  return /^(?:https?:\/\/|mailto:)/i.test(address) ? address : null;
}

function anchor(address, children) {
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}
