// The one shared state, kept in the URL. Each write names its source; the view that made a change does not redraw from it.

import type { Study } from "./types";

export interface Shared {
  study: string;
  /** An index of the study, or an upload's name. */
  image: string;
  layer: number;
  head: number;
  token: number;
  mode: number;
  metric: string;
  /** Share of a map's cells that count as strong. */
  threshold: number;
  /** Which images are selected; see brush.ts for its words. */
  brush: string;
  /** Whether views B and C show the one image or the selected set. */
  scope: "image" | "set";
  /** What colours the dots of view A. */
  colour: string;
}

const START: Shared = {
  study: "",
  image: "0",
  layer: 0,
  head: 0,
  token: 0,
  mode: 2,
  metric: "",
  threshold: 0.01,
  brush: "",
  scope: "set",
  colour: "correctness",
};
const NUMBERS = ["layer", "head", "token", "mode", "threshold"] as const;
/** Changes within this time of each other are one step of the back button: holding an arrow key is one move. */
const ONE_MOVE_MS = 400;

class State implements Shared {
  study = $state(START.study);
  image = $state(START.image);
  layer = $state(START.layer);
  head = $state(START.head);
  token = $state(START.token);
  mode = $state(START.mode);
  metric = $state(START.metric);
  threshold = $state(START.threshold);
  brush = $state(START.brush);
  scope = $state(START.scope);
  colour = $state(START.colour);
  /** Who wrote last. */
  source = $state("url");

  #about: Study | undefined;
  #written = -Infinity;

  /** Read the URL once the study is known, so that every value is one that exists. */
  begin(about: Study): void {
    this.#about = about;
    const asked = read(location.search);
    this.#take({ ...START, study: about.name, metric: firstMetric(about), ...asked }, "url");
    if (asked.study && asked.study !== about.name) console.info(`This link was made on the study ${asked.study}.`);
    history.replaceState(null, "", this.address());
    addEventListener("popstate", () => this.#take({ ...START, metric: firstMetric(about), ...read(location.search) }, "history"));
  }

  /** Change some of the state; the URL follows. */
  write(change: Partial<Shared>, source: string): void {
    const before = this.address();
    this.#take(change, source);
    const after = this.address();
    if (after === before) return;
    const now = performance.now();
    if (now - this.#written < ONE_MOVE_MS) history.replaceState(null, "", after);
    else history.pushState(null, "", after);
    this.#written = now;
  }

  /** The URL that reproduces this screen. */
  address(): string {
    const held = Object.keys(START).map((key) => [key, String(this[key as keyof Shared])] as [string, string]);
    return "?" + new URLSearchParams(held.filter(([key, value]) => value !== "" || key === "image"));
  }

  #take(change: Partial<Shared>, source: string): void {
    Object.assign(this, change);
    this.source = source;
    const about = this.#about;
    if (!about) return;
    this.study = about.name;
    this.layer = within(this.layer, about.n_heads.length);
    this.head = within(this.head, about.n_heads[this.layer] ?? 1);
    this.mode = 1 + within(this.mode - 1, 6);
    this.token = Math.max(0, Math.round(this.token) || 0);
    this.threshold = Math.min(1, Math.max(1e-4, this.threshold || START.threshold));
    if (!/^u[0-9a-f]+$/.test(this.image)) this.image = String(within(Number(this.image), about.sizes.image ?? 1));
    if (!(this.metric in about.measures)) this.metric = firstMetric(about);
  }
}

function within(index: number, size: number): number {
  return Math.max(0, Math.min(size - 1, Math.round(index) || 0));
}

function read(search: string): Partial<Shared> {
  const given = new URLSearchParams(search);
  const found: Record<string, string | number> = {};
  for (const key of Object.keys(START)) {
    const text = given.get(key);
    if (text !== null) found[key] = (NUMBERS as readonly string[]).includes(key) ? Number(text) : text;
  }
  return found as Partial<Shared>;
}

/** The measures that are one number per image and head, in the study's order; the number of a cluster has no mean. */
export function headMetrics(about: Study): string[] {
  return Object.keys(about.measures).filter(
    (name) => about.measures[name]?.dims.join() === "image,layer,head" && !name.startsWith("pattern_"),
  );
}

function firstMetric(about: Study): string {
  const known = headMetrics(about);
  return known.includes("head_probability") ? "head_probability" : (known[0] ?? "");
}

export const shared = new State();
