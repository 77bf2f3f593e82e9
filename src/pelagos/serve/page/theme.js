// Light, dark, or as the system says; a classic script, so that the first paint has the right colours.
"use strict";
{
  const THEMES = { auto: "light", light: "dark", dark: "auto" }; // each with what follows it
  const root = document.documentElement;
  let theme = "auto";
  try {
    theme = localStorage.getItem("pelagos.theme") || "auto";
  } catch { /* storage is forbidden: as the system says */ }
  root.dataset.theme = theme in THEMES ? theme : "auto";
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => button.setAttribute("aria-label", button.title = `Colours: ${root.dataset.theme}`);
    label();
    button.addEventListener("click", () => {
      root.dataset.theme = THEMES[root.dataset.theme];
      label();
      try {
        localStorage.setItem("pelagos.theme", root.dataset.theme);
      } catch { /* kept for this page only */ }
    });
  });
}
