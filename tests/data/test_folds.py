import csv
import gzip
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from pneumo.data import folds
from pneumo.data.cases import Case
from pneumo.errors import DataError, UsageError


def made_up(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    areas = np.where(rng.random(count) < 0.22, rng.lognormal(9, 1, count).astype(int) + 1, 0)
    return [f"case-{seed}-{i}" for i in range(count)], areas


def counts(fold_of: np.ndarray, strata: np.ndarray, count: int = 5) -> np.ndarray:
    return np.array([np.bincount(strata[fold_of == f], minlength=strata.max() + 1) for f in range(count)])


def test_by_hand():
    ids = ["a", "b", "c", "d", "e", "f"]
    fold_of = folds.split(ids, [0, 0, 0, 10, 20, 0], count=2, area_bins=1)
    assert sorted(fold_of.tolist()) == [0, 0, 0, 1, 1, 1]
    assert fold_of[3] != fold_of[4]  # one positive in each


@pytest.mark.parametrize("seed", range(8))
def test_any_two_folds_differ_by_at_most_one_image_a_stratum(seed):
    ids, areas = made_up(int(np.random.default_rng(seed).integers(5, 700)), seed)
    fold_of = folds.split(ids, areas, seed=seed)
    table = counts(fold_of, folds._strata(areas, 4, ids))
    assert (table.max(axis=0) - table.min(axis=0)).max() <= 1
    positives = table[:, 1:].sum(axis=1)
    assert positives.max() - positives.min() <= 1


def test_the_order_of_the_input_does_not_matter():
    ids, areas = made_up(300, 1)
    groups = [f"p{i // 3}" if i % 2 else None for i in range(300)]
    straight = dict(zip(ids, folds.split(ids, areas, groups).tolist(), strict=True))
    order = np.random.default_rng(0).permutation(300)
    shuffled = folds.split([ids[i] for i in order], areas[order], [groups[i] for i in order])
    assert dict(zip([ids[i] for i in order], shuffled.tolist(), strict=True)) == straight


def test_another_seed_deals_otherwise():
    ids, areas = made_up(300, 1)
    assert (folds.split(ids, areas, seed=0) != folds.split(ids, areas, seed=1)).any()


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed):
    rng = np.random.default_rng(seed)
    ids, areas = made_up(400, seed)
    groups = [f"p{n}" if n < 120 else None for n in rng.integers(0, 200, 400)]
    fold_of = folds.split(ids, areas, groups)
    places = defaultdict(set)
    for name, fold in zip(groups, fold_of.tolist(), strict=True):
        if name is not None:
            places[name].add(fold)
    assert max(map(len, places.values())) == 1
    assert np.bincount(fold_of, minlength=5).min() > 60


def test_a_group_named_like_a_lone_image_is_not_joined_to_it():
    fold_of = folds.split(["a", "b", "c", "d"], [0, 0, 0, 0], [None, "a", "a", None], count=3)
    assert fold_of[1] == fold_of[2]
    assert fold_of[0] != fold_of[1]


def test_refusals():
    with pytest.raises(UsageError, match="2 independent images or groups cannot fill"):
        folds.split(["a", "b", "c"], [0, 0, 0], ["p", "p", None], count=3)
    with pytest.raises(ValueError, match="different"):
        folds.split(["a", "a"], [0, 0], count=2)
    with pytest.raises(ValueError, match="lengths"):
        folds.split(["a", "b"], [0], count=2)


@pytest.mark.fault("R20", "the challenge's own ids and patients, split five ways")
def test_real_patients_stay_together_and_shares_agree(siim, figure):
    areas: dict[str, int] = defaultdict(int)
    with gzip.open(siim / "train-rle-real.csv.gz", "rt") as file:
        for image_id, code in list(csv.reader(file))[1:]:
            areas[image_id] += 0 if code.strip() == "-1" else sum(map(int, code.split()[1::2]))
    with gzip.open(siim / "patients.csv.gz", "rt") as file:
        patient = dict(list(csv.reader(file))[1:])
    ids = list(areas)
    patients = [patient.get(image_id) for image_id in ids]
    fold_of = folds.split(ids, list(areas.values()), patients)
    report = folds.audit(fold_of, list(areas.values()), patients, None)
    shares = [row["positive_share"] for row in report["folds"]]
    assert report["patients_crossing"] == 0
    assert report["patients_known"] == 6162
    assert max(shares) - min(shares) <= 0.005
    figure(f"0 of 6,162 patients in two folds, prevalence within {100 * (max(shares) - min(shares)):.2f} pp")


def test_duplicates_are_found_and_kept_together():
    rng, ids = np.random.default_rng(0), list(map(str, range(1500)))
    thumbnails = rng.random((1500, 16, 16)).astype(np.float32) * 255
    thumbnails[1400] = thumbnails[3] * 0.8 + 10  # the same picture, other exposure
    thumbnails[7] = thumbnails[900] + rng.normal(0, 1, (16, 16))
    thumbnails[20] = thumbnails[21] = 128.0  # constant pictures resemble none
    pairs = folds.find_duplicates(ids, thumbnails, 0.995)
    assert sorted(pairs) == [(3, 1400), (7, 900)]
    assert folds.find_duplicates(ids, thumbnails, 1.0) == [(3, 1400)]
    assert folds.find_duplicates([], thumbnails[:0], 0.995) == []


def test_copies_of_one_picture_take_no_memory_by_their_square():
    picture = np.random.default_rng(0).random((1, 16, 16)).astype(np.float32)
    ids = list(map(str, range(12_000)))
    assert len(folds.find_duplicates(ids[:1000], picture.repeat(1000, axis=0), 0.995)) == 499_500
    with pytest.raises(
        DataError,
        match=r"more than 1,000,000 pairs .* as 0 and 11,999 others: .* above 0\.995, .*Remove the copies, or raise",
    ):
        folds.find_duplicates(ids, picture.repeat(12_000, axis=0), 0.995)
    train, test = ([Case(f"{part}{i}", Path(f"{part}/{i}"), ()) for i in range(2000)] for part in ("train", "test"))
    notes = folds.seen_in_training(train, test, picture.repeat(4000, axis=0), 0.995)
    assert [note.image_id for note in notes] == [case.image_id for case in test]
    assert re.fullmatch(r"test/7: nearly the same picture as train/\d+ and 1,999 more, so that .*", notes[7].message)


def test_what_was_kept_together_is_read_again(tmp_path):
    ids, path = ["a", "b", "c", "d", "e"], tmp_path / "folds.csv"
    path.write_text(folds.dumps(ids, np.array([0, 1, 0, 1, 0]), [None, "p1", "q", "p1", "q"]))
    assert "p1" not in path.read_text() and path.read_text().splitlines()[4] == "d,1,b"  # never a patient's name
    assert folds.kept_together(path, ids) == [(1, 1), (2, 2), (1, 3), (2, 4)]
    path.write_text("ImageId,fold\n" + "".join(f"{image_id},0\n" for image_id in ids))
    assert folds.kept_together(path, ids) is None


def test_groups_join_over_duplicates():
    joined = folds.join_groups(["p", "p", "q", None, None, None], [(1, 2), (3, 4)])
    assert joined[0] == joined[1] == joined[2] == "p"
    assert joined[3] == joined[4] != joined[5] is None
    assert joined[3] is not None


def test_audit_sees_a_leak():
    report = folds.audit(np.array([0, 0, 1, 1]), [5, 0, 5, 0], ["p", "q", "p", None], [(0, 1), (1, 2)])
    assert report["patients_crossing"] == 1
    assert report["duplicates_crossing"] == 1
    assert report["folds"][0] == {
        "fold": 0,
        "images": 2,
        "positives": 1,
        "positive_share": 0.5,
        "patients": 2,
    }
    assert report["duplicates_contradicting"] == 2
    assert "in more than one fold: 1, annotated empty and not: 2" in folds.audit_text(report)
    unknown = folds.audit(np.array([0, 1]), [5, 0], [None, None], None)
    assert unknown["duplicate_pairs"] is unknown["duplicates_contradicting"] is None


def test_a_fold_file_reads_back(tmp_path):
    ids, areas = made_up(50, 0)
    fold_of = folds.split(ids, areas)
    path = tmp_path / "folds.csv"
    path.write_text(folds.dumps(ids, fold_of, [None] * 50))
    np.testing.assert_array_equal(folds.load(path, ids, 5, redo=""), fold_of)
    back = folds.load(path, ids[::-1], 5, redo="")
    assert folds.fingerprint(ids[::-1], back) == folds.fingerprint(ids, fold_of)
    assert folds.fingerprint(ids, (fold_of + 1) % 5) != folds.fingerprint(ids, fold_of)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ImageId,fold\na,0\n", "1 image has no fold: b"),
        ("ImageId,fold\na,0\nb,1\nc,1\n", "1 fold is of an unknown image: c"),
        ("ImageId,fold\na,0\nb,5\n", 'line 3, ImageId b, fold: expected one from 0 to 4, got "5"'),
        ("ImageId,fold\na,0\na,1\n", "line 3, ImageId a: it stands there twice"),
        ("id;fold\na;0\n", "separated by semicolons"),
        ("", "folds.csv: empty"),
        (
            "ImageId,fold\na,0\nb,1\n",
            r"folds\.csv has 2 folds, but folds\.count is 5: fold 2 has no image\. Set folds\.count=2 to keep them\. "
            r"Split anew\.$",
        ),
        ("ImageId,fold\na,0\nb,2\n", r"2 folds, but folds\.count is 5: fold 1 has no image\. Split anew\.$"),
        ("ImageId,fold\na,0\nb,0\n", r"1 fold, but folds\.count is 5: fold 1 has no image\. Split anew\.$"),
    ],
)
def test_a_wrong_fold_file_is_refused(tmp_path, text, message):
    (tmp_path / "folds.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        folds.load(tmp_path / "folds.csv", ["a", "b"], 5, redo="Split anew.")


def test_all_of_two_patients_join_over_one_duplicate():
    """Not the two images of the pair alone: the others of either patient must follow them."""
    joined = folds.join_groups(["p", "q", "q", "p", None], [(0, 2)])
    assert joined[:4] == ["p"] * 4 and joined[4] is None
    fold_of = folds.split(list("abcde"), [0] * 5, joined, count=2)
    assert len(set(fold_of[:4].tolist())) == 1


def test_duplicates_among_many_images_are_told_by_their_places():
    thumbnails = np.random.default_rng(0).random((folds.BLOCK + 76, 16, 16)).astype(np.float32)
    thumbnails[-1] = thumbnails[-9]
    thumbnails[-30] = thumbnails[2]
    count = len(thumbnails)
    found = folds.find_duplicates(list(map(str, range(count))), thumbnails, 0.995)
    assert found == [(2, count - 30), (count - 9, count - 1)]


def test_audit_counts_the_duplicates_that_cross_folds():
    report = folds.audit(np.array([0, 0, 0, 1]), [5, 0, 5, 0], [None] * 4, [(0, 1), (1, 2), (2, 3)])
    assert (report["duplicate_pairs"], report["duplicates_crossing"]) == (3, 1)


def test_the_nearest_training_image_is_named():
    train, test = ([Case(f"{part}{i}", Path(f"{part}/{i}"), ()) for i in range(5)] for part in ("train", "test"))
    thumbnails = np.random.default_rng(0).random((10, 16, 16)).astype(np.float32)
    thumbnails[5 + 1] = thumbnails[3]
    (note,) = folds.seen_in_training(train, test, thumbnails, 0.995)
    assert note.message.startswith("test/1: nearly the same picture as train/3, so that")


def test_images_of_one_area_are_split_alike_in_any_order():
    ids, areas = [f"case-{i}" for i in range(60)], np.full(60, 77)
    straight = dict(zip(ids, folds.split(ids, areas).tolist(), strict=True))
    order = np.random.default_rng(0).permutation(60)
    shuffled = folds.split([ids[i] for i in order], areas[order])
    assert dict(zip([ids[i] for i in order], shuffled.tolist(), strict=True)) == straight


def test_images_of_unknown_patients_are_no_patient(tmp_path):
    ids, fold_of = ["a", "b", "c", "d"], np.array([0, 1, 0, 1])
    folds.check_patients(tmp_path, ids, fold_of, [None, None, "p", "q"], redo="")
    with pytest.raises(DataError, match=r"1 image is in another fold than one of the same patient, as a and b. Redo"):
        folds.check_patients(tmp_path, ids, fold_of, ["p", "p", None, None], redo="Redo.")
