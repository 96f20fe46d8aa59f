// The one shared state, kept in the URL. Each write names its source; the view that made a change does not redraw from it.

import * as address from "./address";
import { firstToken, tokenIn } from "./grids";
import { firstMetric } from "./metrics";
import { TABS, type TabId } from "./tabs";
import type { Study } from "./types";

export interface Shared {
  study: string;
  tab: TabId;
  /** An index of the study, or an upload's name. */
  image: string;
  layer: number;
  head: number;
  token: number;
  /** The neuron: a channel of the tokens, in digits; empty for the one that finds objects best. */
  channel: string;
  mode: number;
  metric: string;
  /** The measure that the view of every measure shows. */
  measure: string;
  /** What is drawn over the photograph; see overlays/. */
  overlay: string;
  /** Whether an overlay's scale is its own and not that of the whole layer. */
  own: "" | "yes";
  /** How strongly the overlay is drawn, in percent; at 0 the photograph stands alone, in its colours. */
  strength: number;
  /** Share of a map's cells that count as strong. */
  threshold: number;
  /** What is changed on the tab "What if"; see changes.ts for its words. */
  change: string;
  /** Which of the other studies this one is compared with. */
  other: number;
  /** Which images are selected; see brush.ts for its words. */
  brush: string;
  /** Whether the views of heads show the one image or the selected set. */
  scope: "image" | "set";
  /** Whether the grid of heads has numbers in its cells and not small maps. */
  cells: "" | "numbers";
  /** What colours the dots of the images. */
  colour: string;
  /** The map of the images; empty for the study's first. */
  layout: string;
}

const START: Shared = {
  study: "",
  tab: "findings",
  image: "0",
  layer: 0,
  head: 0,
  token: 0,
  channel: "",
  mode: 2,
  metric: "",
  measure: "",
  overlay: "",
  own: "",
  strength: 100,
  threshold: 0.01,
  change: "",
  other: 0,
  brush: "",
  scope: "set",
  cells: "",
  colour: "",
  layout: "",
};
const NUMBERS = ["layer", "head", "token", "mode", "strength", "threshold", "other"] as const;
/** Changes within this time of each other are one step of the back button: holding an arrow key is one move. */
const ONE_MOVE_MS = 400;
const UPLOAD = /^u[0-9a-f]+$/;

class State implements Shared {
  study = $state(START.study);
  tab = $state<TabId>(START.tab);
  image = $state(START.image);
  layer = $state(START.layer);
  head = $state(START.head);
  token = $state(START.token);
  channel = $state(START.channel);
  mode = $state(START.mode);
  metric = $state(START.metric);
  measure = $state(START.measure);
  overlay = $state(START.overlay);
  own = $state<"" | "yes">(START.own);
  strength = $state(START.strength);
  threshold = $state(START.threshold);
  change = $state(START.change);
  other = $state(START.other);
  brush = $state(START.brush);
  scope = $state(START.scope);
  cells = $state<"" | "numbers">(START.cells);
  colour = $state(START.colour);
  layout = $state(START.layout);
  /** Who wrote last. */
  source = $state("url");
  /** What a link named and this study does not have, as sentences. */
  gone = $state<string[]>([]);

  #about: Study | undefined;
  #written = -Infinity;

  /** Read the URL once the study is known, so that every value is one that exists. */
  begin(about: Study): void {
    this.#about = about;
    this.#read("url");
    address.write(this.address(), "replace");
    addEventListener("popstate", () => this.#read("history"));
  }

  /** Change some of the state; the URL follows. */
  write(change: Partial<Shared>, source: string): void {
    const before = this.address();
    const tab = this.tab;
    this.#take(change, source);
    const after = this.address();
    if (after === before) return;
    const now = performance.now();
    address.write(after, now - this.#written < ONE_MOVE_MS && tab === this.tab ? "replace" : "push");
    this.#written = now;
  }

  /** The URL that reproduces this screen. */
  address(change: Partial<Shared> = {}): string {
    const values = { ...this.#values(), ...change };
    const entries = Object.entries(values).map(([key, value]) => [key, String(value)] as [string, string]);
    return "?" + new URLSearchParams(entries.filter(([key, value]) => value !== "" || key === "image"));
  }

  #values(): Shared {
    const names = Object.keys(START) as (keyof Shared)[];
    return Object.fromEntries(names.map((key) => [key, this[key]])) as unknown as Shared;
  }

  #read(source: string): void {
    const about = this.#about!;
    const asked = read(address.read());
    this.gone = missing(asked, about);
    const start = { ...about.start, image: String(about.start.image) };
    const layer = within(asked.layer ?? about.start.layer, about.n_heads.length);
    this.#take({ ...START, ...start, token: firstToken(about, layer), metric: firstMetric(about), ...asked }, source);
  }

  #take(change: Partial<Shared>, source: string): void {
    const before = this.layer;
    Object.assign(this, change);
    this.source = source;
    const about = this.#about;
    if (!about) return;
    this.study = about.name;
    if (!TABS.some(({ id }) => id === this.tab)) this.tab = START.tab;
    this.layer = within(this.layer, about.n_heads.length);
    this.head = within(this.head, about.n_heads[this.layer] ?? 1);
    this.mode = 1 + within(this.mode - 1, 6);
    this.token = Math.max(0, Math.round(this.token) || 0);
    if (change.token === undefined) this.token = tokenIn(about, this.token, before, this.layer);
    this.threshold = Math.min(1, Math.max(1e-4, this.threshold || START.threshold));
    this.strength = Number.isNaN(this.strength)
      ? START.strength
      : Math.min(100, Math.max(0, Math.round(this.strength)));
    if (!/^\d{0,5}$/.test(this.channel)) this.channel = "";
    this.other = within(this.other, about.others?.length ?? 0);
    this.own = this.own ? "yes" : "";
    if (this.scope !== "image") this.scope = "set";
    if (this.cells !== "numbers") this.cells = "";
    if (!UPLOAD.test(this.image)) this.image = String(within(Number(this.image), about.sizes.image ?? 1));
    if (!(this.metric in about.measures)) this.metric = firstMetric(about);
    if (!(this.measure in about.measures)) this.measure = "";
    if (!about.maps.some(({ name }) => name === this.layout)) this.layout = "";
  }
}

export const within = (index: number, size: number): number => Math.max(0, Math.min(size - 1, Math.round(index) || 0));

/** What a link names that is not there; the page then shows the nearest thing that is. */
export function missing(asked: Partial<Shared>, about: Study): string[] {
  const n = about.sizes.image ?? 1;
  const { study, image, layer, head, metric, layout } = asked;
  const gone: string[] = [];
  if (study && study !== about.name) gone.push(`This link was made on the study ${study}; this is ${about.name}.`);
  if (image !== undefined && !UPLOAD.test(image) && !(Number(image) >= 0 && Number(image) < n))
    gone.push(`There is no image ${image}: this study has 0 to ${n - 1}.`);
  if (layer !== undefined && !(layer >= 0 && layer < about.n_heads.length))
    gone.push(`There is no layer ${layer}: this model has 0 to ${about.n_heads.length - 1}.`);
  else if (head !== undefined && !(head >= 0 && head < (about.n_heads[layer ?? 0] ?? 1)))
    gone.push(`There is no head ${head} in layer ${layer ?? 0}.`);
  if (metric && !(metric in about.measures)) gone.push(`This study holds no ${metric}.`);
  if (layout && !about.maps.some(({ name }) => name === layout))
    gone.push(`This study has no map of its images called ${layout}.`);
  return gone;
}

function read(search: string): Partial<Shared> {
  const given = new URLSearchParams(search);
  const values: Record<string, string | number> = {};
  for (const key of Object.keys(START)) {
    const text = given.get(key);
    if (text !== null) values[key] = (NUMBERS as readonly string[]).includes(key) ? Number(text) : text;
  }
  return values as Partial<Shared>;
}

export const shared = new State();
