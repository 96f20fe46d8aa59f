// The photograph of an image; its thumbnail stands in where the file has gone.

import { photographAt, thumbnail } from "./api";
import type { Study } from "./types";

export interface Photograph {
  source: string | undefined;
  /** Why the photograph itself cannot be shown; empty where it can. */
  missing: string;
}

/** What is shown until the photograph is there, or instead of it. */
export const standIn = (image: string, study: Study): string | undefined =>
  study.has_thumbnails ? thumbnail(image) : undefined;

/** The photograph's address. A photograph that has gone is no error of a view: the sentence comes along. */
export async function photographOrThumbnail(image: string, study: Study, signal: AbortSignal): Promise<Photograph> {
  try {
    return { source: await photographAt(image, signal), missing: "" };
  } catch (failure) {
    if (signal.aborted) throw failure;
    return { source: standIn(image, study), missing: failure instanceof Error ? failure.message : String(failure) };
  }
}
