import gzip
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pneumo.data import cases
from pneumo.data.problems import raise_fatal
from pneumo.errors import DataError
from pneumo.kernels.runs import mask_to_runs, runs_to_mask

GRID = 64


def folder(tmp_path: Path, text: str | bytes, name: str = "train-rle.csv", ids: tuple[str, ...] = ("a", "b")) -> Path:
    """A data folder with images of these ids and one CSV."""
    (tmp_path / "train").mkdir()
    for number, image_id in enumerate(ids):
        pixels = np.random.default_rng(number).integers(0, 256, (GRID, GRID), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / f"{image_id}.png")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def load(root: Path, **options):
    return cases.load_train(root, annotation_size=GRID, **options)


def fatal(root: Path, **options) -> list[str]:
    found = [problem.message for problem in load(root, **options)[1] if problem.fatal]
    assert found
    return found


PLAIN = "ImageId,EncodedPixels\na,3 2\nb,-1\n"


@pytest.mark.fault("I1", "blanks, BOM, CRLF, CR, quotes, blank lines and columns, other names")
def test_spellings_in_circulation(tmp_path, figure):
    spellings = [
        PLAIN,
        PLAIN.replace(",", ", "),  # as train-rle.csv has it, header and values
        PLAIN.replace(",-1", ", -1"),
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        'ImageId,"EncodedPixels"\n"a","3 2"\nb," -1"\n',
        'ImageId, "EncodedPixels"\na, "3 2"\n "b",  "-1"\n',  # a value quoted after a blank
        PLAIN + "\n \n,\n",
        PLAIN.replace("\n", ",,\n"),  # blank columns, as Excel leaves them
        "fname,mask\na,3 2\nb,-1\n",
    ]
    root = folder(tmp_path, PLAIN)
    for text in spellings:
        (root / "train-rle.csv").write_bytes(text.encode())
        found, problems = load(root)
        assert problems == [], text
        assert [(case.image_id, case.runs.tolist(), case.positive, case.area) for case in found] == [
            ("a", [[3, 5]], True, 2),
            ("b", [], False, 0),
        ], text
    figure(f"accepted {len(spellings)}/{len(spellings)}")


@pytest.mark.parametrize("name", ["train-rle.csv", "stage_2_train.csv", "train.csv"])
def test_names_in_circulation(tmp_path, name):
    assert len(load(folder(tmp_path, PLAIN, name))[0]) == 2


def test_gzip(tmp_path):
    root = folder(tmp_path, gzip.compress(PLAIN.encode()), "train-rle.csv.gz")
    assert len(load(root)[0]) == 2


def test_two_tables_are_a_question(tmp_path):
    root = folder(tmp_path, PLAIN)
    (root / "stage_2_train.csv").write_text(PLAIN)
    assert "Set data.annotations to one of them" in fatal(root)[0]
    assert len(load(root, annotations="stage_2_train.csv")[0]) == 2


@pytest.mark.fault("I4", "three rows of an image, two of which overlap")
def test_rows_of_one_image_are_united_with_one_warning(tmp_path):
    root = folder(tmp_path, "ImageId,EncodedPixels\na,3 4\nb,-1\na,5 4\na,20 1\n")
    found, problems = load(root)
    assert found[0].runs.tolist() == [[3, 9], [20, 21]]
    assert [problem.fatal for problem in problems] == [False]
    assert "2 pixels" in problems[0].message


def test_ids_that_look_like_numbers_or_nothing(tmp_path):
    ids = ("00012", "12", "NA", "1.20", "1.2")
    text = "ImageId,EncodedPixels\n" + "".join(f"{image_id},-1\n" for image_id in ids)
    found, problems = load(folder(tmp_path, text, ids=ids))
    assert [case.image_id for case in found] == sorted(ids)
    assert problems == []


def each_bad_row_is_named(root: Path, rows: list[tuple[str, str]]) -> None:
    for row, message in rows:
        (root / "train-rle.csv").write_text(f"ImageId,EncodedPixels\n{row}\nb,-1\n")
        found = fatal(root)
        assert any(re.fullmatch(re.escape(str(root / "train-rle.csv")) + " " + message, text) for text in found), found


@pytest.mark.fault("I3", "eight kinds of bad codes; file, line, ImageId, token, value and the way out are named")
def test_a_bad_code_is_named(tmp_path, figure):
    where = "line 2, ImageId a, EncodedPixels: "
    rows = [
        ("a,1 2 3", where + r'3 numbers; gap/length pairs need an even count \(last token "3"\)'),
        ("a,1 x", where + 'token 2 is not a whole number of up to 18 digits: "x"'),
        ("a,1 0", where + r'run 1 has length 0 \(token 2: "0"\); not pairs of gap and length'),
        ("a,-4 2", where + 'token 1 is negative: "-4"'),
        ("a,4 -2", where + 'token 2 is negative: "-2"'),
        (
            "a,4090 9",
            where + r"run 1 ends at pixel 4,099, past 64×64 = 4,096\. Was the mask made for another size\? "
            r"Set data\.annotation_size",
        ),
        ("a," + "9" * 20 + " 1", where + f'token 1 is not a whole number of up to 18 digits: "{"9" * 20}"'),
        ("a,", where + 'an empty code; an empty mask is "-1"'),
    ]
    each_bad_row_is_named(folder(tmp_path, ""), rows)
    longer = [
        (
            "a,5000 1",
            where + 'token 1 is larger than 64×64 = 4,096 pixels: "5000"'
            r"\. Was the mask made for another size\? Set data\.annotation_size",
        ),
        ("a," + "1 " * 10_000, where + r"19,999 characters, more than any mask of 64×64 needs\. Was .*"),
        ("a,1 2,3 4", "line 2: 3 fields, the header has 2: a comma too many or too few"),
    ]
    each_bad_row_is_named(tmp_path, longer)
    figure(f"{len(rows)} of {len(rows)} kinds named")


@pytest.mark.fault("I5", "-1 and a mask for one image, in either order")
def test_empty_and_not_empty_is_refused(tmp_path, figure):
    where = r"line {}, ImageId a, EncodedPixels: empty here, but line {} has a mask of it\. Delete one of them\."
    rows = [("a,1 2\na,-1", where.format(3, 2)), ("a,-1\na,1 2", where.format(2, 3))]
    each_bad_row_is_named(folder(tmp_path, ""), rows)
    figure("2 of 2 named")


@pytest.mark.fault(
    "I7", "ids that lead out of the folder, of NUL, blanks, 300 characters or nothing; files opened are watched"
)
def test_an_id_is_never_a_way_out(tmp_path, figure):
    ids = ["../../a", "/etc/passwd", "a/../a", "..", ".a", "a" * 300, "a b", "ä", "C:\\a", "~root", ""]
    (tmp_path / "data").mkdir()
    root = folder(tmp_path / "data", "")
    (root / "test").mkdir()
    (tmp_path / "a.png").write_bytes(b"secret")
    opened: list[str] = []
    watching = True

    def watch(event, arguments):  # a hook stays for as long as the process lives
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    for image_id in ids:
        for name in ("train-rle.csv", "sample.csv", "patients.csv"):
            (root / name).write_text(f"ImageId,EncodedPixels,patient_id\n{image_id},1 1,1\nb,-1,2\n")
        opened.clear()
        found, problems = load(root, allow_missing=True)
        assert sum("line 2: ImageId" in problem.message and problem.fatal for problem in problems) == 2, image_id
        assert [case.image_id for case in found] == ["b"]
        _, _, problems = cases.load_test(root, test="train", sample="sample.csv", allow_missing=True)
        assert sum("line 2: ImageId" in problem.message and problem.fatal for problem in problems) == 1, image_id
        ours = [path for path in opened if not path.startswith(sys.base_prefix)]  # Python reads modules late
        assert ours and all(path.startswith(str(root)) for path in ours), ours
    watching = False
    (root / "train-rle.csv").write_text("ImageId,EncodedPixels\na\0b,1 1\n")
    assert "binary" in fatal(root)[0]
    figure(f"{len(ids) + 1} of {len(ids) + 1} refused in 3 tables, 0 files opened outside the data folder")


@pytest.mark.fault("I2", "no table, or one of another kind: file, what was found, what is expected")
def test_what_is_no_table_is_named(tmp_path, figure):
    contents = [
        (b"", "empty"),
        (b" \n\r\n", "empty"),
        (b"ImageId;EncodedPixels\na;-1\n", "found 'ImageId;EncodedPixels', columns are separated by semicolons"),
        (b"sep=;\nImageId;EncodedPixels\na;-1\n", "found 'sep=;', columns are separated by semicolons"),
        (PLAIN.encode("utf-16"), "UTF-16"),
        (PLAIN.encode("utf-16-le"), "UTF-16"),
        (PLAIN.replace("a", "\xe9").encode("latin-1"), "not UTF-8 at byte 2"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
        (b"Image,Pixels\na,-1\n", "column ImageId is missing; found 'Image, Pixels'"),
        (b"ImageId,ImageId,mask\na,a,-1\n", "column ImageId is there twice"),
        (b"a,-1\nb,-1\n", "found 'a, -1'"),
        (b"ImageId,EncodedPixels\n", "no rows"),
        (b'ImageId,EncodedPixels\na,"1 2\nb,-1\n', "line 3: not a CSV"),
        (b"PK\x03\x04" + bytes(30), "ZIP"),
        (b"\x1f\x8b\x08broken", "gzip"),
        (gzip.compress(PLAIN.encode())[:-9], "gzip"),
        (b"a\x00b", "binary"),
    ]
    root = folder(tmp_path, b"")
    for content, reason in contents:
        (root / "train-rle.csv").write_bytes(content)
        (message,) = fatal(root)
        assert message.startswith(str(tmp_path / "train-rle.csv")) and reason in message, message
        assert reason in ("no rows", "line 3: not a CSV") or "Expected: a CSV with columns ImageId" in message, message
    figure(f"{len(contents)} of {len(contents)} named")


@pytest.mark.fault("I6", "rows without an image: an error, or dropped with a warning by data.allow_missing")
def test_rows_without_image_stop_unless_allowed(tmp_path, figure):
    root = folder(tmp_path, PLAIN + "c,-1\nd,1 1\n")
    assert "c, d" in fatal(root)[0]
    found, problems = load(root, allow_missing=True)
    assert [case.image_id for case in found] == ["a", "b"]
    assert "c, d" in problems[0].message and not problems[0].fatal
    more = [f"x{i}" for i in range(37)]
    (root / "train-rle.csv").write_text(PLAIN + "".join(f"{image_id},-1\n" for image_id in more))
    (message,) = fatal(root)
    assert "37 of 39 ids have no image" in message and "x0, x1, x2, x3, x4 and 32 more" in message
    assert "copy them, or set data.allow_missing" in message
    with pytest.raises(DataError, match=r"All are listed in .*report\.csv\.$"):
        raise_fatal(load(root)[1], root / "report.csv")
    assert len((root / "report.csv").read_text().splitlines()) == 38
    figure("37 of 39 missing: 5 named, 37 in the report")


@pytest.mark.fault("I6", "an image without a row: dropped with a warning")
def test_images_without_row_are_left_out_with_a_warning(tmp_path):
    found, problems = load(folder(tmp_path, PLAIN, ids=("a", "b", "lateral")))
    assert len(found) == 2
    assert "lateral" in problems[0].message and not problems[0].fatal


@pytest.mark.fault("I6", "no image at all, where none is needed")
def test_annotations_alone(tmp_path):
    (tmp_path / "train-rle.csv").write_text(PLAIN)
    assert "no such folder" in fatal(tmp_path)[0]
    found, problems = load(tmp_path, need_images=False)
    assert [case.path for case in found] == [None, None]
    assert problems == []


@pytest.mark.fault("I11", "masks of 0 and 1, of 0 and 255")
@pytest.mark.parametrize("white", [1, 255])
def test_mask_pictures(tmp_path, white):
    root = folder(tmp_path, "nothing", "notes.txt")
    (root / "mask").mkdir()
    mask = np.zeros((GRID, GRID), dtype=bool)
    mask[10:20, 5:9] = True
    Image.fromarray(mask.astype(np.uint8) * white).save(root / "mask" / "a.png")
    Image.fromarray(np.zeros((GRID, GRID), np.uint8)).save(root / "mask" / "b.png")
    found, problems = load(root)
    assert problems == []
    np.testing.assert_array_equal(found[0].runs, mask_to_runs(mask))
    assert not found[1].positive


@pytest.mark.fault("I11", "mask pictures of the positives alone: said, and mended by a key")
def test_images_without_a_mask_picture(tmp_path):
    root = folder(tmp_path, "", "unused.txt", ids=("a", "b", "c"))
    (root / "mask").mkdir()
    half = np.repeat(np.array([0, 255], np.uint8), GRID // 2)[None].repeat(GRID, 0)
    Image.fromarray(half).save(root / "mask" / "b.png")
    found, (problem,) = load(root)
    assert [case.image_id for case in found] == ["b"]
    assert not problem.fatal and problem.message == (
        f"{root / 'train'}: 2 of 3 images are not in {root / 'mask'} and are left out; a negative needs an all-black "
        f"picture there, or --set data.unmasked=empty: a, c."
    )
    assert cases.one_sided(found).startswith("NOT ONE of the 1 training images is without pneumothorax")
    found, (problem,) = load(root, unmasked="empty")
    assert [(case.image_id, case.area) for case in found] == [("a", 0), ("b", GRID**2 // 2), ("c", 0)]
    assert not problem.fatal and "2 of 3 images are not in" in problem.message and len(problem.each) == 2
    assert cases.one_sided(found) == cases.one_sided([]) == ""
    assert cases.one_sided(found[::2]).startswith("NOT ONE of the 2 training images has a pneumothorax")


def test_mask_pictures_beside_a_csv_are_passed_over_with_a_note(tmp_path):
    root = folder(tmp_path, "ImageId,EncodedPixels\na,-1\n", ids=("a",))
    assert load(root)[1] == []
    (root / "mask").mkdir()
    half = np.repeat(np.array([0, 255], np.uint8), GRID // 2)[None].repeat(GRID, 0)
    Image.fromarray(half).save(root / "mask" / "a.png")
    (case,), (problem,) = load(root)
    assert case.area == 0 and not problem.fatal
    assert problem.message == f"{root}: train-rle.csv is read, mask/ beside it is not. data.annotations says which."
    (case,), problems = load(root, annotations="mask")
    assert (case.area, problems) == (GRID**2 // 2, [])
    assert load(root, annotations="train-rle.csv")[1] == []


@pytest.mark.fault("I11", "smoothed, three-channel and other-sized masks: named with their values or sizes")
def test_doubtful_mask_pictures_are_refused(tmp_path, figure):
    root = folder(tmp_path, "nothing", "notes.txt", ids=("a",))
    (root / "masks").mkdir()
    path = root / "masks" / "a.png"
    plain = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (GRID, GRID))
    smoothed = np.where(plain[:, ::-1] > 0, 128, plain)
    doubtful = [
        (smoothed, "nothing but 0 and 255, or 0 and 1; found 3 values: 0, 128, 255."),
        (np.stack([plain, 0 * plain, plain], axis=-1), "a mask must be grey, of 0 and 255; this one has colours"),
        (
            plain[: GRID // 2],
            f"the mask is 64 x 32 pixels, its image {root / 'train' / 'a.png'} is 64 x 64. They must be "
            "of one size: resize the mask to the image's, each pixel taking its nearest (no smoothing), or give the "
            "image in full size.",
        ),
    ]
    for pixels, message in doubtful:
        Image.fromarray(pixels).save(path)
        (found,) = fatal(root)
        assert found.startswith(str(path)) and message in found, found
    Image.fromarray(np.stack([plain] * 3, axis=-1)).save(path)  # three channels, but grey
    assert load(root)[0][0].area == (plain > 0).sum()
    figure(f"{len(doubtful)} of {len(doubtful)} named")


@pytest.mark.parametrize(("known", "doubted"), [(1, True), (2, False), (3, False)])
def test_a_map_of_less_than_half_of_the_images_is_doubted(tmp_path, known, doubted):
    ids = ("a", "b", "c", "d")
    root = folder(tmp_path, "ImageId,EncodedPixels\n" + "".join(f"{image_id},-1\n" for image_id in ids), ids=ids)
    (root / "patients.csv").write_text("ImageId,patient_id\n" + "".join(f"{i},p\n" for i in ids[:known]))
    (problem,) = load(root)[1]
    assert problem.message.count("fewer than half of the images have a patient, do the ids fit? 3 of 4") == doubted
    assert not problem.fatal


def test_patients(tmp_path):
    root = folder(tmp_path, PLAIN)
    (root / "patients.csv").write_text("ImageId,patient_id\na,0007\nz,1\n")
    found, problems = load(root)
    assert [case.patient for case in found] == ["0007", None]
    assert "1 of 2 images has no patient there, it is taken for a patient: b." in problems[0].message
    (root / "patients.csv").write_text("ImageId,patient_id\nb.dcm,1\na.dcm,2\n")
    (message,) = fatal(root)
    assert message.startswith(
        f"{root / 'patients.csv'}: none of its 2 ids is that of an image: it has a.dcm, the images"
    )
    assert "have a. An ImageId is a file's name without suffix" in message
    (root / "patients.csv").write_text("ImageId,patient_id\na,1\na,2\nb,\n")
    assert len(fatal(root)) == 2
    (root / "patients.csv").write_text("image,patient_id\na,1\nb,2\n")
    (problem,) = load(root)[1]
    assert "column ImageId is missing" in problem.message


@pytest.mark.fault("I8", "a sample of 1,484 rows and 1,372 ids, as the challenge's first one")
def test_a_sample_with_repeated_ids(tmp_path, figure):
    rng = random.Random(0)
    unique = [f"id-{i}" for i in range(1372)]
    rows = unique + rng.choices(unique, k=112)
    rng.shuffle(rows)
    path = tmp_path / "sample_submission.csv"
    path.write_text("ImageId,EncodedPixels\n" + "".join(f"{image_id},-1\n" for image_id in rows))
    ids, (problem,) = cases.read_sample(path)
    assert ids == list(dict.fromkeys(rows))
    assert "1,484 rows have 1,372 different ids; one row each is written" in problem.message and not problem.fatal
    assert len(problem.each) == 112
    figure(f"1,484 rows: {len(ids):,} ids, in the order of first appearance")


def test_test_cases_stand_by_id_whatever_the_samples_order(tmp_path):
    folder(tmp_path, PLAIN)
    (tmp_path / "train").rename(tmp_path / "test")
    (tmp_path / "sample_submission.csv").write_text("ImageId,EncodedPixels\nb,-1\na,-1\nb,1 2\n")
    found, ids, problems = cases.load_test(tmp_path)
    assert ids == ["b", "a"]
    assert [case.image_id for case in found] == ["a", "b"]  # whatever the sample's order: packs rely on it
    assert "3 rows have 2 different ids" in problems[0].message and not problems[0].fatal


@pytest.mark.fault("I6", "a sample none of whose ids has an image, with data.allow_missing: an error still")
def test_a_sample_of_other_images_is_refused(tmp_path):
    folder(tmp_path, PLAIN)
    (tmp_path / "train").rename(tmp_path / "test")
    (tmp_path / "sample_submission.csv").write_text("ImageId,EncodedPixels\nx,-1\ny,-1\n")
    _, _, problems = cases.load_test(tmp_path, allow_missing=True)
    (message,) = [problem.message for problem in problems if problem.fatal]
    sample = tmp_path / "sample_submission.csv"
    assert message == f"{sample}: not a single test image: none of its ids has one in {tmp_path / 'test'}"
    _, _, problems = cases.load_test(tmp_path)
    assert ["2 of 2 ids have no image" in problem.message for problem in problems if problem.fatal] == [True]


def test_without_a_sample_all_images_count(tmp_path):
    folder(tmp_path, PLAIN)
    (tmp_path / "train").rename(tmp_path / "test")
    assert cases.load_test(tmp_path)[1] == ["a", "b"]


@pytest.mark.fault("P7", "._a.png, Thumbs.db, .DS_Store, DICOMDIR, a folder in a folder, .PNG")
def test_folders_are_searched_and_junk_is_passed_over(tmp_path):
    root = folder(tmp_path, PLAIN)
    (root / "train" / "study" / "series").mkdir(parents=True)
    (root / "train" / "b.png").rename(root / "train" / "study" / "series" / "b.PNG")
    for junk in ("._a.png", "Thumbs.db", ".DS_Store", "DICOMDIR"):
        (root / "train" / junk).write_bytes(b"junk")
    found, problems = load(root)
    assert [case.image_id for case in found] == ["a", "b"]
    assert problems == []


def test_one_id_twice_is_refused(tmp_path):
    root = folder(tmp_path, PLAIN)
    (root / "train" / "more").mkdir()
    shutil.copy(root / "train" / "a.png", root / "train" / "more" / "a.png")
    assert "twice" in fatal(root)[0]


@pytest.mark.fault("P1", "two bad files and an odd one: all listed")
def test_verify_lists_every_problem_in_one_go(tmp_path):
    root = folder(tmp_path, PLAIN.replace("b,-1", "b,-1\nc,-1\nd,-1"), ids=("a", "b", "c", "d"))
    (root / "train" / "b.png").write_bytes((root / "train" / "b.png").read_bytes()[:400])
    (root / "train" / "c.png").write_bytes(b"<html>")
    Image.fromarray(np.full((GRID, GRID), 9, np.uint8)).save(root / "train" / "d.png")
    found, _ = load(root)
    problems, _ = cases.verify(found)
    assert [(problem.image_id, problem.fatal) for problem in problems] == [("b", True), ("c", True), ("d", False)]
    with pytest.raises(DataError, match=r"b\.png.*1 more"):
        raise_fatal(problems, tmp_path / "report.csv")
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 4


def test_a_code_for_an_oblong_image_is_refused_and_a_mask_is_padded_like_it(tmp_path):
    root = folder(tmp_path, PLAIN)
    oblong = np.random.default_rng(0).integers(0, 256, (GRID, GRID // 2), dtype=np.uint8)
    for image_id in "ab":
        Image.fromarray(oblong).save(root / "train" / f"{image_id}.png")
    (message,) = fatal(root)  # not of b, whose mask is empty in any shape
    assert "line 2, ImageId a" in message and "32 x 64 pixels and not square" in message
    (root / "mask").mkdir()
    for image_id in "ab":
        Image.fromarray(np.full((GRID, GRID // 2), 255, np.uint8)).save(root / "mask" / f"{image_id}.png")
    found, problems = load(root, annotations="mask")
    assert problems == []
    expected = np.zeros((GRID, GRID), dtype=bool)
    expected[:, GRID // 4 : 3 * GRID // 4] = True
    np.testing.assert_array_equal(runs_to_mask(found[0].runs, GRID, GRID), expected)


def test_masks_of_another_size_than_the_grid_are_resized(tmp_path):
    root = folder(tmp_path, "nothing", "notes.txt", ids=("a",))
    (root / "mask").mkdir()
    mask = np.random.default_rng(0).random((GRID, GRID)) < 0.5
    Image.fromarray((mask * 255).astype(np.uint8)).save(root / "mask" / "a.png")
    halved = mask.reshape(GRID // 2, 2, GRID // 2, 2).mean(axis=(1, 3)) >= 0.5
    for size, expected in ((2 * GRID, mask.repeat(2, 0).repeat(2, 1)), (GRID // 2, halved)):
        (case,), _ = cases.load_train(root, annotation_size=size)
        np.testing.assert_array_equal(runs_to_mask(case.runs, size, size), expected)


def test_a_mask_too_thin_for_the_grid_is_said(tmp_path):
    """Its image counts as negative, which nobody would see otherwise."""
    root = folder(tmp_path, "nothing", "notes.txt", ids=("a", "b", "c"))
    (root / "mask").mkdir()
    for name, columns in (("a", 0), ("b", 1), ("c", 2)):
        mask = np.zeros((GRID, GRID), np.uint8)
        mask[4:20, 8 : 8 + columns] = 255
        mask[4:20:2] *= columns > 1  # of the second one a quarter of each pixel of the grid
        Image.fromarray(mask).save(root / "mask" / f"{name}.png")
    found, problems = cases.load_train(root, annotation_size=GRID // 2)
    assert [case.positive for case in found] == [False, False, True]
    (problem,) = problems
    assert not problem.fatal and "1 of 3 masks has no pixel left on the annotation grid of" in problem.message
    assert problem.message.endswith(": b.") and "a larger data.annotation_size" in problem.message
    assert cases.load_train(root, annotation_size=GRID)[1] == []


def test_runs_that_touch_are_joined(tmp_path):
    found, _ = load(folder(tmp_path, "ImageId,EncodedPixels\na,3 2 0 4\nb,-1\n"))
    assert found[0].runs.tolist() == [[3, 9]]


def test_same_row_twice_counts_once(tmp_path):
    found, problems = load(folder(tmp_path, PLAIN + "a,3 2\nb,-1\n"))
    assert found[0].runs.tolist() == [[3, 5]] and not found[1].positive
    (problem,) = problems
    assert not problem.fatal and "2 rows" in problem.message
    assert [(one.row, one.image_id) for one in problem.each] == [(2, "a"), (3, "b")]


def test_a_code_longer_than_the_csv_module_likes(tmp_path):
    code = " ".join(["1 1"] * 100_000)
    found, problems = cases.read_codes(folder(tmp_path, f"ImageId,EncodedPixels\na,{code}\n") / "train-rle.csv", 1024)
    assert problems == [] and len(found["a"]) == 100_000


def test_a_shifted_row_never_becomes_an_id(tmp_path):
    messages = fatal(folder(tmp_path, "ImageId,EncodedPixels\na,b,3 2\nb,-1,\n"))
    assert "line 2: 3 fields, the header has 2" in messages[0]
    assert "line 3: 3 fields" in messages[1]


def test_other_columns_are_passed_over(tmp_path):
    found, problems = load(folder(tmp_path, ",ImageId,Age,EncodedPixels\n0,a,30,3 2\n1,b,,-1\n"))
    assert [case.area for case in found] == [2, 0] and problems == []


def test_an_image_with_a_bad_row_is_not_said_to_have_none(tmp_path):
    _, problems = load(folder(tmp_path, "ImageId,EncodedPixels\na,1\nb,-1\n"))
    assert len(problems) == 1


def test_all_bad_rows_and_masks_are_listed(tmp_path):
    root = folder(tmp_path, "ImageId,EncodedPixels\na,1\nb,x 1\n")
    assert len(fatal(root)) == 2
    (root / "mask").mkdir()
    for image_id in "ab":
        (root / "mask" / f"{image_id}.png").write_bytes(b"")
    messages = fatal(root, annotations="mask")
    assert [message.split(": ")[0] for message in messages] == [str(root / "mask" / f"{i}.png") for i in "ab"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"train": "images"}, "images: no such folder; {root} has: train. Set data.train."),
        ({"annotations": "none.csv"}, "none.csv: not there. data.annotations is relative to data.root."),
        ({"patients": "none.csv"}, "none.csv: not there. data.patients"),
    ],
)
def test_what_the_recipe_names_must_be_there(tmp_path, options, reason):
    root = folder(tmp_path, PLAIN)
    assert reason.format(root=root) in fatal(root, **options)[0]


def test_nothing_to_go_by(tmp_path):
    assert "Set data.root" in fatal(tmp_path / "none")[0]
    assert "Set data.root" in cases.load_test(tmp_path / "none")[2][0].message
    root = folder(tmp_path, "a,b\n", "notes.csv")
    assert "CSV files there: notes.csv. Set data.annotations." in fatal(root)[0]
    (root / "empty").mkdir()
    assert "no PNG, JPEG or DICOM file in it" in fatal(root, train="empty")[0]
    (root / "mask").mkdir()
    assert "no masks in it" in fatal(root)[0]


def test_a_wrong_folder_shows_what_it_has(tmp_path):
    (message,) = fatal(folder(tmp_path, PLAIN.replace("a,", "c,").replace("b,", "d,")))
    assert "2 of 2 ids have no image" in message and "which has 2, the first being a" in message


def test_links_and_strange_names(tmp_path):
    (tmp_path / "dät a").mkdir()
    root = folder(tmp_path / "dät a", PLAIN)
    (root / "train" / "loop").symlink_to(root / "train", target_is_directory=True)
    (root / "elsewhere").mkdir()
    (root / "train" / "b.png").rename(root / "elsewhere" / "b.png")
    (root / "train" / "far").symlink_to(root / "elsewhere", target_is_directory=True)
    found, problems = load(root)
    assert [case.image_id for case in found] == ["a", "b"] and problems == []
    (root / "train" / "my scan.png").write_bytes(b"")
    assert "my scan.png: an ImageId is" in fatal(root)[0]


def test_other_files_are_left_out_with_a_warning(tmp_path):
    root = folder(tmp_path, PLAIN)
    (root / "train" / "notes.txt").write_text("x")
    (root / "train" / "c.tiff").write_bytes(b"II*\0")
    _, (problem,) = load(root)
    assert not problem.fatal and "2 files are no PNG, JPEG or DICOM" in problem.message


def test_dicom_without_suffix_is_found(tmp_path):
    root = folder(tmp_path, PLAIN.replace("b,", "1.2.840.3,"), ids=("a",))
    (root / "train" / "1.2.840.3").write_bytes(bytes(128) + b"DICM")
    found, problems = load(root)
    assert [case.path.name for case in found] == ["1.2.840.3", "a.png"] and problems == []
    assert [problem.image_id for problem in cases.verify(found)[0]] == ["1.2.840.3"]


def test_pipes_are_not_waited_for(tmp_path):
    root = folder(tmp_path, PLAIN)
    os.mkfifo(root / "train" / "c.png")
    os.mkfifo(root / "pipe.csv")
    found, _ = load(root)
    assert len(found) == 2
    assert "no such file" in cases.read_codes(root / "pipe.csv", GRID)[1][0].message


def test_sample_ids_without_image(tmp_path):
    folder(tmp_path, PLAIN)
    (tmp_path / "train").rename(tmp_path / "test")
    (tmp_path / "stage_2_sample_submission.csv.gz").write_bytes(gzip.compress(b"ImageId,EncodedPixels\nc,-1\nb,-1\n"))
    _, _, problems = cases.load_test(tmp_path)
    assert [problem.fatal for problem in problems] == [True, False]
    assert "1 of 2 ids has no image" in problems[0].message and "1 of 2 images is not in" in problems[1].message
    found, ids, problems = cases.load_test(tmp_path, allow_missing=True)
    assert [case.image_id for case in found] == ["b"] and ids == ["c", "b"]
    assert not any(problem.fatal for problem in problems)
    (tmp_path / "sample_submission.csv").write_text("ImageId\na\n")
    assert "Set data.sample to one of them" in cases.load_test(tmp_path)[2][0].message
    assert cases.load_test(tmp_path, sample="sample_submission.csv")[1] == ["a"]


def test_a_damaged_table_never_raises(tmp_path):
    rng = random.Random(0)
    pieces = [b",", b'"', b"\n", b"\r", b"\0", b"\xff", b"-", b" ", b"9" * 30, b";", b"../", b"nan", b"\xe2\x80\x8b"]
    text = (
        "ImageId, EncodedPixels\n" + "".join(f"id_{i}, {rng.choice(['-1', '3 2 9 1'])}\n" for i in range(20))
    ).encode()
    path = tmp_path / "train-rle.csv"
    refused = 0
    for _ in range(150):
        content = bytearray(rng.choice([text, gzip.compress(text)]))
        for _ in range(rng.randint(1, 5)):
            at = rng.randrange(len(content))
            content[at : at + rng.randrange(3)] = rng.choice([*pieces, rng.randbytes(1)])
        path.write_bytes(content)
        _, problems = cases.read_codes(path, GRID)
        for problem in [*problems, *cases.read_sample(path)[1], *cases.read_patients(path)[1]]:
            assert problem.message.startswith(str(path)) and "\n" not in problem.message
        refused += any(problem.fatal for problem in problems)
    assert refused > 75


def test_real_annotations(siim):
    by_csv, problems = cases.load_train(siim / "gold-1024")
    assert [problem.message for problem in problems if problem.fatal] == []
    by_mask, _ = cases.load_train(siim / "gold-1024", annotations="mask")
    assert len(by_csv) == len(by_mask) == 21
    for a, b in zip(by_csv, by_mask, strict=True):
        assert a.image_id == b.image_id
        np.testing.assert_array_equal(runs_to_mask(a.runs, 1024, 1024), runs_to_mask(b.runs, 1024, 1024))
    runs_of, problems = cases.read_codes(siim / "train-rle-real.csv.gz", 1024)
    assert len(runs_of) == 11_972
    assert sum(len(runs) > 0 for runs in runs_of.values()) == 2_621
    assert json.dumps([problem.fatal for problem in problems]) == "[false]"
    assert "181 images" in problems[0].message


def test_masks_of_more_than_half_an_image_are_said(tmp_path):
    """As if white were the background."""
    root = folder(tmp_path, f"ImageId,EncodedPixels\na,0 {GRID**2 // 2 + 1}\nb,0 {GRID**2 // 2}\n")
    found, (problem,) = load(root)
    assert len(found) == 2 and not problem.fatal
    assert problem.message.endswith("1 of 2 masks covers more than half of the image (inverted?): a.")


def test_a_table_that_cannot_be_read_gives_no_other_advice(tmp_path):
    """That all images are without a row, and how they become negatives, would be wrong."""
    root = folder(tmp_path, "id,code\na,-1\nb,-1\n")
    for unmasked in ("leave", "empty"):
        _, problems = load(root, unmasked=unmasked)
        assert [problem.fatal for problem in problems] == [True]


def test_ids_without_an_image_are_counted_among_those_of_the_table(tmp_path):
    root = folder(tmp_path, "ImageId,EncodedPixels\na.png,-1\nb.png,-1\n")
    _, problems = load(root, unmasked="empty")
    (missing,) = [problem.message for problem in problems if problem.fatal]
    assert "2 of 2 ids have no image" in missing and "which has 2, the first being a)" in missing


def test_a_mask_of_another_width_is_refused(tmp_path):
    root = folder(tmp_path, "nothing", "notes.txt", ids=("a",))
    (root / "mask").mkdir()
    Image.fromarray(np.full((GRID, GRID // 2), 255, np.uint8)).save(root / "mask" / "a.png")
    (message,) = fatal(root)
    assert "the mask is 32 x 64 pixels, its image" in message and "EXIF" not in message
    Image.fromarray(np.zeros((GRID, GRID // 2), np.uint8)).save(root / "train" / "a.png")
    Image.fromarray(np.full((GRID // 2, GRID), 255, np.uint8)).save(root / "mask" / "a.png")
    (message,) = fatal(root)
    assert "the mask is 64 x 32 pixels, its image" in message and "EXIF orientation turns it" in message


def test_thumbnails_show_all_of_an_image(tmp_path):
    root = folder(tmp_path, "ImageId,EncodedPixels\na,-1\n", ids=("a",))
    pixels = np.zeros((GRID, 4 * GRID), np.uint8)
    pixels[:, -GRID:] = 200
    Image.fromarray(pixels).save(root / "train" / "a.png")
    _, thumbnails = cases.verify(load(root)[0])
    lit = np.zeros((16, 16), dtype=bool)
    lit[6:10, 12:] = True
    np.testing.assert_array_equal(thumbnails[0] > 100, lit)


def test_nothing_left_is_an_error(tmp_path):
    root = folder(tmp_path, "ImageId,EncodedPixels\nx,-1\ny,-1\n")
    assert "not a single case" in fatal(root, allow_missing=True)[0]


def test_a_patient_that_is_written_in_two_ways_is_warned_of(tmp_path):
    """As where a table program took leading zeros away; no patient is named."""
    path = tmp_path / "patients.csv"
    path.write_text("ImageId,patient_id\na,Ab1\nb,aB1\nc,007\nd,7\ne,8\nf,Ab1\n")
    (problem,) = cases.read_patients(path)[1]
    assert not problem.fatal and "2 patients differ from another in case or leading zeros alone" in problem.message
    assert ", as of a and b, c and d, and would be on both sides" in problem.message and "Ab1" not in problem.message
    path.write_text("ImageId,patient_id\na,1\nb,2\nc,1\n")
    assert cases.read_patients(path)[1] == []


def test_a_column_of_another_name_is_used_only_where_the_real_one_is_not(tmp_path):
    """As `mask`, which may hold the path of a picture."""
    path = tmp_path / "train.csv"
    path.write_text("ImageId,EncodedPixels,mask,fname\na,3 2,masks/a.png,x\n")
    (runs,), problems = cases.read_codes(path, GRID)[0].values(), cases.read_codes(path, GRID)[1]
    assert runs.tolist() == [[3, 5]] and problems == []


def test_half_of_the_images_with_a_patient_are_enough(tmp_path):
    ids = ("a", "b", "c", "d")
    root = folder(tmp_path, "ImageId,EncodedPixels\n" + "".join(f"{image_id},-1\n" for image_id in ids), ids=ids)
    (root / "patients.csv").write_text("ImageId,patient_id\na,p\nb,q\n")
    (problem,) = load(root)[1]
    assert "2 of 4 images have no patient there" in problem.message and "do the ids fit" not in problem.message


def test_a_folder_that_cannot_be_read_is_named(tmp_path, locked_refused):
    root = folder(tmp_path, PLAIN)
    (root / "train" / "locked").mkdir()
    assert fatal(root) == [f"{root / 'train' / 'locked'}: cannot be read: Permission denied"]


def test_names_of_any_case_and_folders_of_such_names(tmp_path):
    root = folder(tmp_path, PLAIN, "Train-RLE.CSV")
    (root / "train.csv").mkdir()
    assert len(load(root)[0]) == 2
