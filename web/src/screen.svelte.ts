// What the screen is like: how large its type is, and whether it is dark. Charts follow both.

const NORMAL_TYPE_PX = 13.3;
const STORED = "vitrail-theme";
/** The choice in this browser; a frame without an origin of its own has none. */
const storage = (): Storage | undefined => (origin === "null" ? undefined : localStorage);
/** What this browser keeps for the page, or null; with a value, keeps it. */
export function stored(key: string, value?: string): string | null {
  if (value !== undefined) storage()?.setItem(key, value);
  return storage()?.getItem(key) ?? null;
}
const wanted = matchMedia("(prefers-color-scheme: dark)");

class Screen {
  /** The type's size against that of a small laptop; lengths inside charts are multiplied by it. */
  k = $state(1);
  dark = $state(false);

  constructor() {
    const chosen = stored(STORED);
    if (chosen) document.documentElement.dataset.theme = chosen;
    this.#look();
    addEventListener("resize", () => this.#look());
    wanted.addEventListener("change", () => this.#look());
  }

  /** Change between light and dark; the choice is kept in this browser. */
  toggle(): void {
    const next = this.dark ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    stored(STORED, next);
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
