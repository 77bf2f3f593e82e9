// Light, dark, or as the system says; a classic script, so that the first paint has the right colours.
"use strict";
const root = document.documentElement, NEXT = { auto: "light", light: "dark", dark: "auto" };
root.dataset.theme = localStorage.getItem("pelagos.theme") ?? "auto";
addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme");
  const show = () => button.setAttribute("aria-label", button.title = `Colours: ${root.dataset.theme}`);
  button.addEventListener("click", () => {
    root.dataset.theme = NEXT[root.dataset.theme] ?? "auto";
    localStorage.setItem("pelagos.theme", root.dataset.theme);
    show();
  });
  show();
});
