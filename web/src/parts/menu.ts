// A menu that opens from its summary: Escape closes it and nothing else, and so does a press anywhere outside.

export function menu(details: HTMLDetailsElement) {
  function pressed(event: KeyboardEvent) {
    if (!details.open || event.key !== "Escape") return;
    event.stopPropagation();
    details.open = false;
    details.querySelector("summary")!.focus();
  }
  function left(event: PointerEvent) {
    if (details.open && !details.contains(event.target as Node)) details.open = false;
  }
  addEventListener("keydown", pressed, true);
  addEventListener("pointerdown", left, true);
  return {
    destroy() {
      removeEventListener("keydown", pressed, true);
      removeEventListener("pointerdown", left, true);
    },
  };
}
