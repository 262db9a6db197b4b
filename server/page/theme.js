// Runs before the page is drawn, so that a theme chosen by hand never flashes in late.
(() => {
  const key = "jax-engine-theme";
  const chosen = localStorage.getItem(key);
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  window.toggleTheme = () => {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const next = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
    if (next === system) {
      delete root.dataset.theme; // follow the system again
      localStorage.removeItem(key);
    } else {
      root.dataset.theme = next;
      localStorage.setItem(key, next);
    }
    return next;
  };
})();
