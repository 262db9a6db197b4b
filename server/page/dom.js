// Elements made by hand. Text only ever becomes text nodes: nothing that a model or a user wrote is read as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element: `on` holds listeners, null and false leave an attribute out, strings become text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const ICONS = {
  check: "M5 12.5l4.5 4.5L19 7.5",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  retry: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  tokens: "M4 6h6v5H4zM14 6h6v5h-6zM4 15h9v4H4zM17 15h3v4h-3z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  wrench: "M14.5 6.5a4 4 0 0 1 5-1l-3 3 2 2 3-3a4 4 0 0 1-5.5 5L8 20.5 4.5 17l8-8a4 4 0 0 1 2-2.5z",
};

/** A line drawing that says nothing by itself: what it stands on has a name. */
export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A small button with a drawing; its name is read out, shown as a tooltip, and written beside the drawing if `text`. */
export function iconButton(name, label, onClick, { text = null } = {}) {
  const attributes = { type: "button", class: "quiet", on: { click: onClick } };
  if (!text) Object.assign(attributes, { "aria-label": label, title: label });
  return h("button", attributes, icon(name), text ? h("span", {}, text) : null);
}

/** Put text on the clipboard; resolves to whether that worked. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return false;
    }
  }
  // Over plain HTTP from another machine there is no clipboard API.
  const area = h("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** A copy button, which says for a moment that it has copied. `text` is a function: what is there by then. */
export function copyButton(label, text, announce) {
  const button = iconButton("copy", label, async () => {
    const done = await copyText(text());
    button.replaceChildren(icon(done ? "check" : "copy"));
    announce(done ? "Copied" : "Copying is not allowed here");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}
