// A page draws itself anew (`redraw`) where its width or its colours change, and for paper.
let width = window.innerWidth;
let pending;
window.addEventListener("resize", () => {
  // On a phone, scrolling changes the height alone.
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  clearTimeout(pending);
  pending = setTimeout(redraw, 150);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
// Paper is light: print in the light scheme with nothing folded, then go back.
window.addEventListener("beforeprint", () => {
  document.documentElement.dataset.printing = "";
  for (const details of document.querySelectorAll("details")) details.open = true;
  redraw();
});
window.addEventListener("afterprint", () => {
  delete document.documentElement.dataset.printing;
  redraw();
});
