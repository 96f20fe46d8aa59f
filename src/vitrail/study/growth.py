"""A study that grows: more measures or more images than its folder has, and no other difference.

What exists is kept, and a study that has grown has the same arrays, byte for byte, as one that was made at once. No
torch here.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

from vitrail.analysis import analyses, in_order_of_declaration
from vitrail.data import ImageEntry, LabelSource, Manifest
from vitrail.data.files import some
from vitrail.errors import PlanMismatch
from vitrail.study.plan import Plan

__all__ = ["arrange_images", "comparable_plan", "measures_to_renew", "merge_plans", "starts_with"]


def arrange_images(
    existing: Plan, earlier: Manifest, manifest: Manifest, unread: Container[str] = frozenset()
) -> Manifest:
    """Puts the images that a study has in front of those that a run adds, in the study's order.

    Args:
        existing: The plan of the study.
        earlier: The images of the study.
        manifest: Those of a new scan, in the order of their source.
        unread: Ids of images that are there, and that the scan left out as it had as many as it was to have.

    Returns:
        The new scan, reordered if it holds every image of the study unchanged; otherwise as it is.

    Raises:
        PlanMismatch: Some of the study's images are missing or have changed, or have other labels or masks.
    """
    scanned = _match(earlier, manifest)
    missing = [entry.id for entry in earlier.images if entry.id not in scanned]
    if missing and len(manifest.images) < existing.n_images:
        return manifest  # fewer images were asked for, which the plans tell
    pairs = [(each, scanned[each.id]) for each in earlier.images if each.id in scanned]
    _refuse_other_images(
        existing,
        manifest,
        {
            "missing": [id_ for id_ in missing if id_ not in unread],
            "beyond the limit": [id_ for id_ in missing if id_ in unread],
            "changed": [old.id for old, new in pairs if old.digest != new.digest],
            "with another label": [old.id for old, new in pairs if old.label != new.label],
            "with another mask": [old.id for old, new in pairs if old.mask_digest != new.mask_digest],
        },
    )
    first = tuple(replace(scanned[entry.id], id=entry.id) for entry in earlier.images)
    ids = {scanned[entry.id].id for entry in earlier.images}
    added = tuple(entry for entry in manifest.images if entry.id not in ids)
    twice = sorted({entry.id for entry in first} & {entry.id for entry in added})
    if twice:
        raise PlanMismatch(
            f"images: {some(twice)} of this run would have the ids of other images of the folder, as the folder that "
            "all files share is another now. Give them other names, or name another folder to begin anew."
        )
    return replace(manifest, images=(*first, *added))


def _refuse_other_images(existing: Plan, manifest: Manifest, ids_by_reason: Mapping[str, Sequence[str]]) -> None:
    """Refuses a scan in which images of a study are not as they were, and says for each reason what to do."""
    reasons = {reason: ids for reason, ids in ids_by_reason.items() if ids}
    if not reasons:
        return
    has_masks = existing.options.get("masks") == "given"
    remedies = {
        "missing": "put the old ones back",
        "changed": "put the old ones back",
        "beyond the limit": "raise --limit",
        "with another label": f"give the labels that it has ({existing.labels_from})"
        if existing.labels == LabelSource.GIVEN
        else "leave labels out, as it began without",
        "with another mask": "give the same --masks" if has_masks else "leave --masks out, as it began without",
    }
    advice = dict.fromkeys(remedies[reason] for reason in reasons)
    raise PlanMismatch(
        f"images: the folder has {existing.n_images} and this run {len(manifest.images)}, among which those of the "
        f"folder are not as they were: {'; '.join(f'{some(ids)} {reason}' for reason, ids in reasons.items())}. A "
        f"study can gain images; {' and '.join(advice)}, or name another folder to begin anew."
    )


def _match(earlier: Manifest, manifest: Manifest) -> dict[str, ImageEntry]:
    """What a scan holds of a study's images, by their ids in the study.

    The same file with the same content is the same image, although a list that gained files of another folder has given
    it another id; otherwise the id tells.
    """
    by_path = {entry.path: entry for entry in manifest.images if entry.path is not None}
    pairs = ((entry, by_path.get(entry.path or "")) for entry in earlier.images)
    matched = {entry.id: same for entry, same in pairs if same is not None and _content(same) == _content(entry)}
    ids = {same.id for same in matched.values()}
    by_id = {entry.id: entry for entry in manifest.images if entry.id not in ids}
    return {entry.id: by_id[entry.id] for entry in earlier.images if entry.id in by_id} | matched


def merge_plans(existing: Plan, requested: Plan, names: Iterable[str]) -> Plan:
    """The plan of a study after a run has added to it what it asks for.

    Args:
        existing: The plan of the folder.
        requested: The plan of this run: its measures and the folder's, its images.
        names: The measures that this run asks for.

    Returns:
        `requested` with what it need not repeat: measures and options of the folder whose analysis is not installed,
        options that only the folder's measures depend on.
    """
    requested_names = set(names)
    existing_options = {
        name: value for name, value in existing.options.items() if not _depends_on(name, requested_names)
    }
    requested_options = {
        name: value
        for name, value in requested.options.items()
        if _depends_on(name, requested_names) or not _depends_on(name, existing.measures)
    }
    left_out = {**existing.left_out, **requested.left_out}
    other_versions = {name: value for name, value in existing.versions.items() if name not in requested.versions}
    measures = in_order_of_declaration({**existing.measures, **requested.measures})
    return replace(
        requested,
        measures=measures,
        left_out=in_order_of_declaration({name: why for name, why in left_out.items() if name not in measures}),
        options=dict(sorted({**existing_options, **requested_options}.items())),
        versions={**requested.versions, **other_versions},
        threads=existing.threads,
    )


def comparable_plan(plan: Plan, manifest: Manifest, existing: Plan) -> Plan:
    """The part of a plan that must be equal to the plan of the folder it is to be run in.

    Args:
        plan: From `merge_plans`.
        manifest: Its images.
        existing: The plan of the folder.

    Returns:
        `plan` without the measures, options, versions and images that the folder does not have; measures that have a
        later version have the folder's, as they are measured anew.
    """
    kept = {name: existing.measures[name] for name in measures_to_renew(existing, plan)}
    options = {name: value for name, value in existing.options.items() if not _depends_on(name, existing.measures)}
    options |= {name: value for name, value in plan.options.items() if _depends_on(name, existing.measures)}
    comparable = replace(
        plan,
        measures={name: version for name, version in plan.measures.items() if name in existing.measures} | kept,
        left_out=existing.left_out,
        versions={name: version for name, version in plan.versions.items() if name in existing.versions},
        options=options,
    )
    if plan.n_images > existing.n_images and starts_with(manifest, existing):
        comparable = replace(
            comparable,
            n_images=existing.n_images,
            data_digest=existing.data_digest,
        )
    return comparable


def measures_to_renew(existing: Plan, plan: Plan) -> list[str]:
    """Measures of a folder whose declaration has a later version by now.

    Args:
        existing: The plan of the folder.
        plan: Of a run in it.

    Returns:
        Their names; none where packages have other versions, too, as then all numbers would have to be measured anew.
    """
    versions = existing.versions.items() & plan.versions.items()
    if len(versions) < len(existing.versions.keys() & plan.versions.keys()):
        return []
    return [name for name, version in existing.measures.items() if plan.measures.get(name, version) > version]


def _depends_on(option: str, names: Container[str]) -> bool:
    """Whether an option may change one of these measures, or an array that accompanies them.

    False for an option that nothing declares: it is of the folder's own measures, which stay as they are.
    """
    for analysis in analyses().values():
        stored = [measure for measure in analysis.measures if measure.name in names]
        arrays = [*stored, *(analysis.accompanying if stored else ())]
        if any(option in (each.depends_on or ()) for each in arrays):
            return True
    return False


def starts_with(manifest: Manifest, existing: Plan) -> bool:
    """Whether the first images of a scan are those of a study, with the same labels and masks.

    Args:
        manifest: The scan.
        existing: The plan of the study.

    Returns:
        True where the study can go on with them in this order.
    """
    first = manifest.images[: existing.n_images]
    return len(first) == existing.n_images and replace(manifest, images=first).digest == existing.data_digest


def _content(entry: ImageEntry) -> tuple[str, int | None, str | None]:
    return entry.digest, entry.label, entry.mask_digest
