// What a view needs of a study, and what takes its place where the study lacks it.

import { count } from "./format";
import { headMetrics } from "./metrics";
import type { Tab } from "./tabs";
import type { Live, Study } from "./types";

export interface Needs {
  /** Names of measures, all of which must be stored. */
  measures: string[];
  /** At least one measure of every head must be stored. */
  anyOf?: "heads";
  /** Whether another study of the same images must be there. */
  other?: boolean;
  /** Whether the study must have pruning curves. */
  curves?: boolean;
  /** Whether the model must be open behind the page. */
  live: boolean;
}

/** Why a view cannot be drawn. */
export interface Lack {
  sentence: string;
  /** What adds it; empty where nothing does. */
  command: string;
}

/** What the view would show, and what adds it; nothing where the study has all that the view needs. */
export function lacking(view: { shows: string; needs: Needs }, study: Study, live: Live): Lack | undefined {
  const { measures, anyOf, live: needsLive, other, curves } = view.needs;
  if (curves && !study.has_curves)
    return study.class_names.length && "head_probability" in study.measures
      ? {
          sentence: `${view.shows} This study does not hold it yet. To add it, minutes of work:`,
          command: `vitrail curves ${study.in_commands}`,
        }
      : { sentence: `${view.shows} It is measured of classifiers with importance of heads.`, command: "" };
  if (other && !study.others?.length)
    return {
      sentence: `${view.shows} Open this study with another of the same images:`,
      command: `vitrail open ${study.in_commands} --with OTHER_STUDY`,
    };
  const name = measures.find((measure) => !(measure in study.measures));
  if (name !== undefined) {
    const reason = study.left_out[name];
    if (reason) return { sentence: `${view.shows} This study does not have it: ${ended(reason)}`, command: "" };
    const wait = underWay(study, [name]);
    if (wait) return { sentence: `${view.shows} ${wait}`, command: "" };
    const onlyFor = study.analyses.find(({ measures }) => measures.includes(name))?.only_for;
    const how = onlyFor
      ? `Only ${onlyFor} has it. To add it to a study of one:`
      : "This study does not hold it yet. To add it:";
    return { sentence: `${view.shows} ${how}`, command: commandFor(study, name) };
  }
  if (anyOf === "heads" && !headMetrics(study).length) {
    const wait = underWay(study, measuredWith(study, "head_probability"));
    if (wait) return { sentence: `${view.shows} ${wait}`, command: "" };
    return {
      sentence: `${view.shows} This study holds no measure of heads. To add them:`,
      command: commandFor(study, "head_probability"),
    };
  }
  if (needsLive && live.state === "loading")
    return { sentence: `${view.shows} The model is being opened; this comes by itself.`, command: "" };
  if (needsLive && live.state !== "ready") return { sentence: `${view.shows} ${live.reason}`, command: "" };
  return undefined;
}

/** Views of which several wait for one command name it at the first, the others name that view. */
export function saidOnce<V extends { view: { shows: string; question: string }; missing: Lack | undefined }>(
  views: V[],
): V[] {
  const said = new Map<string, string>();
  return views.map((each) => {
    const command = each.missing?.command;
    const where = command && said.get(command);
    if (command && !where) said.set(command, each.view.question);
    if (!where) return each;
    return { ...each, missing: { sentence: `${each.view.shows} The command under “${where}” adds it.`, command: "" } };
  });
}

/** What a tab would show of which a study holds nothing. */
export function lackingAll(tab: Tab, study: Study): Lack {
  const own = study.analyses.filter(({ name }) => tab.analyses.includes(name));
  const reason = own
    .flatMap(({ measures }) => measures)
    .map((name) => study.left_out[name])
    .find(Boolean);
  const questions = own.map(({ question }) => question).join(" ");
  if (reason) return { sentence: `${questions} This study does not have it: ${ended(reason)}`, command: "" };
  const wait = underWay(
    study,
    own.flatMap(({ measures }) => measures),
  );
  if (wait) return { sentence: `${questions} ${wait}`, command: "" };
  return { sentence: `${questions} This study does not hold it yet. To add it:`, command: own[0]?.command ?? "" };
}

/** What to do where one of some measures is being added to the study, or has been since it was opened. */
function underWay(study: Study, names: string[]): string | undefined {
  if (names.some((name) => study.arrived_measures.includes(name)))
    return "It was added after the study was opened. Start vitrail open again to see it.";
  if (names.some((name) => study.missing_measures.includes(name)))
    return "It is being measured, not of every image yet. Start vitrail open again once vitrail study has ended.";
  return undefined;
}

/** What of a study that is still being written the bar says behind its number of images, and what to do about it. */
export function toCome(study: Study): { words: string; advice: string } | undefined {
  const { missing_images: images, missing_measures: measures } = study;
  const hasMore = study.arrived_images > 0 || study.arrived_measures.length > 0;
  const words = [
    images && `${count(images)} to come`,
    measures.length && `${measures.length} measure${measures.length === 1 ? "" : "s"} under way`,
    hasMore && "more there by now",
  ].filter(Boolean);
  if (!words.length) return undefined;
  const when = hasMore ? "More of the study is there than was opened." : "The study is not complete.";
  const names = measures.length ? ` Under way: ${measures.join(", ")}.` : "";
  const what = hasMore ? "" : " once vitrail study has ended";
  return { words: words.join(", "), advice: `${when}${names} Start vitrail open again${what}.` };
}

const ended = (reason: string): string => (reason.endsWith(".") ? reason : `${reason}.`);

const measuredWith = (study: Study, measure: string): string[] =>
  study.analyses.find(({ measures }) => measures.includes(measure))?.measures ?? [];

export const commandFor = (study: Study, measure: string): string =>
  study.analyses.find(({ measures }) => measures.includes(measure))?.command ?? "";
