// Brings a view of the tab into sight, once it stands, and marks it for a moment.

const FRAMES = 120;

export function reveal(view: string, frames = FRAMES): void {
  const found = document.querySelector(`[data-view="${view}"]`);
  if (!found) {
    if (frames) requestAnimationFrame(() => reveal(view, frames - 1));
    return;
  }
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  found.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
  found.classList.add("told");
  found.addEventListener("animationend", () => found.classList.remove("told"), { once: true });
}
