// The panels beside the chat: columns where there is room, sheets over it where there is not.

const KEY = "jax-engine-panels";
const ROOMY = matchMedia("(min-width: 1100px)");
const NAMES = ["settings", "engine"];

export class Panels {
  constructor(chat) {
    this.chat = chat;
    this.listeners = [];
    let open = ["engine"];
    try {
      open = JSON.parse(localStorage.getItem(KEY)) ?? open;
    } catch {
      // Not ours.
    }
    for (const name of NAMES) {
      this.button(name).addEventListener("click", () => this.toggle(name, !this.isOpen(name)));
      this.panel(name).querySelector("[data-close]").addEventListener("click", () => {
        this.toggle(name, false);
        this.button(name).focus();
      });
      this.show(name, ROOMY.matches && open.includes(name));
    }
    ROOMY.addEventListener("change", () => {
      for (const name of NAMES) this.show(name, ROOMY.matches && open.includes(name));
    });
  }

  panel = (name) => document.getElementById(name);
  button = (name) => document.getElementById(`open-${name}`);
  isOpen = (name) => !this.panel(name).hidden;

  toggle(name, isOpen) {
    if (isOpen && !ROOMY.matches) for (const other of NAMES) this.show(other, false);
    this.show(name, isOpen);
    if (isOpen) this.panel(name).querySelector("[data-close]").focus();
    // What is laid over the chat for a moment is not a choice to keep.
    if (ROOMY.matches) localStorage.setItem(KEY, JSON.stringify(NAMES.filter((other) => this.isOpen(other))));
  }

  show(name, isOpen) {
    this.panel(name).hidden = !isOpen;
    this.button(name).setAttribute("aria-expanded", String(isOpen));
    // What lies under a sheet is not to be reached by keyboard.
    this.chat.inert = !ROOMY.matches && NAMES.some(this.isOpen);
    for (const listener of this.listeners) listener(name, isOpen);
  }

  /** Close the sheet that lies over the chat, if one does. */
  closeOverlay() {
    const open = ROOMY.matches ? undefined : NAMES.find(this.isOpen);
    if (!open) return;
    this.show(open, false);
    this.button(open).focus();
  }
}
