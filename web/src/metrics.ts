// Which measures of a study are one quantity for each image and head.

import type { Study } from "./types";

/** The measures that are one quantity per image and head, in the study's order; a class id or a cluster's number has no mean. */
export function headMetrics(study: Study): string[] {
  return Object.keys(study.measures).filter((name) => {
    const measure = study.measures[name];
    return measure?.dims.join() === "image,layer,head" && !name.startsWith("pattern_") && measure.unit !== "class";
  });
}

export function firstMetric(study: Study): string {
  const metrics = headMetrics(study);
  return metrics.includes("head_probability") ? "head_probability" : (metrics[0] ?? "");
}
