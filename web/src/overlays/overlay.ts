// What an overlay is: where its numbers come from, and what it paints for a patch.

import type { TabId } from "../tabs";
import type { Context } from "../types";
import type { Paint } from "./paint";

export interface At {
  image: string;
  layer: number;
  head: number;
  /** The chosen patch on the first layer's grid; 0 for an overlay that does not depend on it. */
  patch: number;
}

/** The numbers of one overlay, asked for once an image, layer and head; painting a patch asks nothing more. */
export interface OverlayData {
  /** `token` is the patch under the pointer or the chosen one, counted with the prefix tokens before it. */
  paint(token: number, own: boolean): Paint | undefined;
  /** The same in another layer, for a strip of all layers; nothing where it would have to be asked for. */
  strip?(layer: number, token: number): Paint | undefined;
}

export interface Overlay {
  id: string;
  title: string;
  /** How to read it, in one line. */
  reading: string;
  source: string;
  /** The tabs that it belongs to; the first that can be drawn is what such a tab opens with. */
  tabs: TabId[];
  /** Whether the model must be open behind the page. */
  live: boolean;
  /** Whether it is of the patch under the pointer. */
  perToken: boolean;
  /** Whether its numbers are of the chosen patch, so that choosing another asks for them. */
  perPatch?: boolean;
  /** Whether it depends on the head. */
  perHead: boolean;
  load(context: Context, at: At, signal: AbortSignal): Promise<OverlayData>;
}
