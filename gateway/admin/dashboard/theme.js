// Before the first paint, and so no module: a page that blinks white at night is not left open.
(() => {
  const kept = localStorage.getItem("penstock-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
