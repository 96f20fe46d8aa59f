import { expect, test } from "vitest";

import { lacking, lackingAll, saidOnce, toCome, type Needs } from "../src/needs";
import type { Tab } from "../src/tabs";
import type { Live, Study } from "../src/types";

const study = {
  name: "mine",
  in_commands: "mine",
  measures: { label: { dims: ["image"], unit: "class" } },
  left_out: { prediction: "it is no classifier." },
  missing_images: 0,
  missing_measures: [],
  arrived_images: 0,
  arrived_measures: [],
  analyses: [
    {
      name: "heads",
      measures: ["strength_entropy", "head_probability"],
      stored: [],
      command: "vitrail study M IMAGES --measures heads",
    },
  ],
} as unknown as Study;
const view = (needs: Partial<Needs>) => ({
  shows: "What it shows.",
  needs: { measures: [], live: false, ...needs },
});

const open: Live = { state: "ready", reason: "" };

test("a view whose needs the study has is drawn", () => {
  expect(lacking(view({ measures: ["label"] }), study, open)).toBeUndefined();
  expect(lacking(view({ live: true }), study, open)).toBeUndefined();
});

test("a measure that is missing comes with the command that adds it", () => {
  const lack = lacking(view({ measures: ["strength_entropy"] }), study, open);
  expect(lack?.sentence).toContain("What it shows.");
  expect(lack?.command).toBe("vitrail study M IMAGES --measures heads");
  expect(lacking(view({ anyOf: "heads" }), study, open)?.command).toContain("--measures heads");
});

test("what is being measured, or was since the study was opened, is not asked for by a command again", () => {
  const tab: Tab = { id: "heads", title: "Heads", question: "", analyses: ["heads"] };
  const running = { ...study, missing_measures: ["strength_entropy"] };
  const ended = { ...study, arrived_measures: ["strength_entropy"] };
  for (const needs of [{ measures: ["strength_entropy"] }, { anyOf: "heads" as const }])
    for (const about of [running, ended]) {
      const lack = lacking(view(needs), about, open)!;
      expect(lack.command).toBe("");
      expect(lack.sentence).toContain("Start vitrail open again");
      expect(lackingAll(tab, about)).toEqual({
        ...lack,
        sentence: expect.stringContaining("Start vitrail open again"),
      });
    }
  expect(lacking(view({ measures: ["strength_entropy"] }), running, open)?.sentence).toContain("It is being measured");
  expect(lacking(view({ measures: ["strength_entropy"] }), ended, open)?.sentence).toContain("It was added after");
});

test("the bar says what is to come of a study, and that more is there than was opened", () => {
  expect(toCome(study)).toBeUndefined();
  const begun = toCome({ ...study, missing_images: 24, missing_measures: ["window"] })!;
  expect(begun.words).toBe("24 to come, 1 measure under way");
  expect(begun.advice).toContain("Under way: window. Start vitrail open again once vitrail study has ended.");
  const more = toCome({ ...study, missing_images: 24, arrived_images: 24 })!;
  expect(more.words).toBe("24 to come, more there by now");
  expect(more.advice).toBe("More of the study is there than was opened. Start vitrail open again.");
});

test("a measure of some models only says so", () => {
  const windows = { name: "windows", measures: ["predicted_area"], only_for: "a WinT", stored: [], command: "vitrail" };
  const about = { ...study, analyses: [...study.analyses, windows] } as unknown as Study;
  expect(lacking(view({ measures: ["predicted_area"] }), about, open)?.sentence).toContain("Only a WinT has it.");
  expect(lacking(view({ measures: ["strength_entropy"] }), about, open)?.sentence).not.toContain("Only");
});

test("a measure that the model cannot have comes with the reason, a closed model with what to do", () => {
  expect(lacking(view({ measures: ["prediction"] }), study, open)?.sentence).toContain("it is no classifier.");
  const closed: Live = { state: "none", reason: "Start it with vitrail open." };
  expect(lacking(view({ live: true }), study, closed)?.sentence).toContain("vitrail open");
  expect(lacking(view({ live: true }), study, { state: "loading", reason: "" })?.sentence).toContain("being opened");
});

test("a tab without any of its measures names the questions and the command", () => {
  const tab: Tab = { id: "heads", title: "Heads", question: "", analyses: ["heads"] };
  const about = { ...study, analyses: [{ ...study.analyses[0]!, question: "Which heads?" }] };
  expect(lackingAll(tab, about)).toEqual({
    sentence: "Which heads? This study does not hold it yet. To add it:",
    command: "vitrail study M IMAGES --measures heads",
  });
});

test("pruning curves are a command away where the study has importance of a classifier's heads", () => {
  const curves = view({ curves: true });
  const ranked = { ...study, class_names: ["cat"], measures: { head_probability: {} } } as unknown as Study;
  expect(lacking(curves, ranked, open)?.command).toBe("vitrail curves mine");
  expect(lacking(curves, { ...ranked, has_curves: true }, open)).toBeUndefined();
  expect(lacking(curves, { ...ranked, class_names: [] }, open)?.command).toBe("");
});

test("a command that adds several views is said at the first of them", () => {
  const lack = { sentence: "It shows. To add it:", command: "vitrail study" };
  const views = [lack, undefined, lack, { ...lack, command: "vitrail curves" }].map((missing) => ({
    view: { shows: "It shows.", question: "What?" },
    missing,
  }));
  expect(saidOnce(views).map(({ missing }) => missing?.command)).toEqual([
    "vitrail study",
    undefined,
    "",
    "vitrail curves",
  ]);
  expect(saidOnce(views)[2]!.missing!.sentence).toBe("It shows. The command under “What?” adds it.");
});
