// The answer of the live model to the changes at hand; several views show parts of the same one.

import { whatIf } from "../../api";
import { changesBody, isChanged, parseChanges } from "../../changes";
import { load, type Loaded } from "../../load.svelte";
import { shared } from "../../state.svelte";
import type { Study, WhatIf } from "../../types";

/** Null where nothing is changed. Call it as a component starts. */
export function answerOf(study: () => Study): Loaded<WhatIf | null> {
  return load(async (signal) => {
    const { image } = shared;
    const changes = parseChanges(shared.change, study());
    return isChanged(changes) ? whatIf(changesBody(image, changes), signal) : null;
  });
}
