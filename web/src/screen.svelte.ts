// What the screen is like: how large its type is, and whether it is dark. Charts follow both.

const NORMAL_TYPE_PX = 13.3;
const STORED = "vitrail-theme";
const wanted = matchMedia("(prefers-color-scheme: dark)");

class Screen {
  /** The type's size against that of a small laptop; lengths inside charts are multiplied by it. */
  k = $state(1);
  dark = $state(false);

  constructor() {
    const chosen = localStorage.getItem(STORED);
    if (chosen) document.documentElement.dataset.theme = chosen;
    this.#look();
    addEventListener("resize", () => this.#look());
    wanted.addEventListener("change", () => this.#look());
  }

  /** Change between light and dark; the choice is kept in this browser. */
  toggle(): void {
    const next = this.dark ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    localStorage.setItem(STORED, next);
    this.#look();
  }

  #look(): void {
    this.k = parseFloat(getComputedStyle(document.documentElement).fontSize) / NORMAL_TYPE_PX || 1;
    this.dark = (document.documentElement.dataset.theme ?? (wanted.matches ? "dark" : "light")) === "dark";
  }
}

export const screen = new Screen();

/** Lengths inside a chart, in pixels of this screen. */
export const px = <T extends number[]>(...lengths: T): { [K in keyof T]: number } =>
  lengths.map((length) => length * screen.k) as { [K in keyof T]: number };
