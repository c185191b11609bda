import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pneumo.data import cases
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


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace(",", ", "),
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        'ImageId,"EncodedPixels"\n"a","3 2"\nb," -1"\n\n',
        "fname,mask\na,3 2\nb,-1\n",
    ],
)
def test_spellings_in_circulation(tmp_path, text):
    found, problems = load(folder(tmp_path, text))
    assert problems == []
    assert [(case.image_id, case.runs.tolist(), case.positive, case.area) for case in found] == [
        ("a", [[3, 5]], True, 2),
        ("b", [], False, 0),
    ]


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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,1 2 3", 'line 2, ImageId a.*3 numbers.*last token "3"'),
        ("a,1 x", 'line 2, ImageId a.*token 2.*"x"'),
        ("a,1 0", "line 2, ImageId a.*run 1 has length 0"),
        ("a,-4 2", "line 2, ImageId a.*token 1 is negative"),
        ("a,4090 9", r"line 2, ImageId a.*run 1 ends at pixel 4,099.*data\.annotation_size"),
        ("a," + "9" * 20 + " 1", "line 2, ImageId a.*token 1"),
        ("a,", "line 2, ImageId a.*empty"),
        ("a,1 2\na,-1", "line 3, ImageId a"),
        ("../../a,1 2", "line 2.*an ImageId is"),
        (".a,1 2", "line 2.*an ImageId is"),
        ("a" * 300 + ",1 2", "line 2.*an ImageId is"),
        ("a,1 2,3 4", "line 2"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    root = folder(tmp_path, f"ImageId,EncodedPixels\n{row}\nb,-1\n")
    assert any(re.search(message, text) for text in fatal(root)), fatal(root)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ImageId;EncodedPixels\na;-1\n",
        PLAIN.encode("utf-16"),
        b"<!DOCTYPE html><html></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        b"Image,Pixels\na,-1\n",
        b"\x1f\x8b\x08broken",
        b"a\x00b",
    ],
)
def test_what_is_no_table_is_named(tmp_path, content):
    (message,) = fatal(folder(tmp_path, content))
    assert "train-rle.csv" in message


def test_rows_without_image_stop_unless_allowed(tmp_path):
    root = folder(tmp_path, PLAIN + "c,-1\nd,1 1\n")
    assert "c, d" in fatal(root)[0]
    found, problems = load(root, allow_missing=True)
    assert [case.image_id for case in found] == ["a", "b"]
    assert "c, d" in problems[0].message and not problems[0].fatal


def test_images_without_row_are_left_out_with_a_warning(tmp_path):
    found, problems = load(folder(tmp_path, PLAIN, ids=("a", "b", "lateral")))
    assert len(found) == 2
    assert "lateral" in problems[0].message and not problems[0].fatal


def test_annotations_alone(tmp_path):
    (tmp_path / "train-rle.csv").write_text(PLAIN)
    assert "no such folder" in fatal(tmp_path)[0]
    found, problems = load(tmp_path, need_images=False)
    assert [case.path for case in found] == [None, None]
    assert problems == []


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


@pytest.mark.parametrize(("size", "values"), [((GRID, GRID), (0, 128, 255)), ((32, GRID), (0, 255))])
def test_doubtful_mask_pictures_are_refused(tmp_path, size, values):
    root = folder(tmp_path, "nothing", "notes.txt")
    (root / "masks").mkdir()
    for image_id in "ab":
        pixels = np.random.default_rng(0).choice(np.array(values, np.uint8), size)
        Image.fromarray(pixels).save(root / "masks" / f"{image_id}.png")
    assert len(fatal(root)) >= 1


def test_patients(tmp_path):
    root = folder(tmp_path, PLAIN)
    (root / "patients.csv").write_text("ImageId,patient_id\na,0007\nz,1\n")
    found, problems = load(root)
    assert [case.patient for case in found] == ["0007", None]
    assert "1 of 2 images have no patient" in problems[0].message
    (root / "patients.csv").write_text("ImageId,patient_id\na,1\na,2\nb,\n")
    assert len(fatal(root)) == 2


def test_a_sample_with_repeated_ids(tmp_path):
    folder(tmp_path, PLAIN)
    (tmp_path / "train").rename(tmp_path / "test")
    (tmp_path / "sample_submission.csv").write_text("ImageId,EncodedPixels\nb,-1\na,-1\nb,1 2\n")
    found, ids, problems = cases.load_test(tmp_path)
    assert ids == [case.image_id for case in found] == ["b", "a"]
    assert "3 rows have 2 different ids" in problems[0].message and not problems[0].fatal


def test_without_a_sample_all_images_count(tmp_path):
    folder(tmp_path, PLAIN)
    (tmp_path / "train").rename(tmp_path / "test")
    assert cases.load_test(tmp_path)[1] == ["a", "b"]


def test_folders_are_searched_and_junk_is_passed_over(tmp_path):
    root = folder(tmp_path, PLAIN)
    (root / "train" / "study" / "series").mkdir(parents=True)
    (root / "train" / "b.png").rename(root / "train" / "study" / "series" / "b.PNG")
    for junk in ("._a.png", "Thumbs.db", ".DS_Store"):
        (root / "train" / junk).write_bytes(b"junk")
    found, problems = load(root)
    assert [case.image_id for case in found] == ["a", "b"]
    assert problems == []


def test_one_id_twice_is_refused(tmp_path):
    root = folder(tmp_path, PLAIN)
    (root / "train" / "more").mkdir()
    shutil.copy(root / "train" / "a.png", root / "train" / "more" / "a.png")
    assert "twice" in fatal(root)[0]


def test_verify_lists_every_problem_in_one_go(tmp_path):
    root = folder(tmp_path, PLAIN.replace("b,-1", "b,-1\nc,-1\nd,-1"), ids=("a", "b", "c", "d"))
    (root / "train" / "b.png").write_bytes((root / "train" / "b.png").read_bytes()[:400])
    (root / "train" / "c.png").write_bytes(b"<html>")
    Image.fromarray(np.full((GRID, GRID), 9, np.uint8)).save(root / "train" / "d.png")
    found, _ = load(root)
    problems = cases.verify(found, progress=lambda items, **_: items)
    assert [(problem.image_id, problem.fatal) for problem in problems] == [("b", True), ("c", True), ("d", False)]
    with pytest.raises(DataError, match=r"b\.png.*1 more"):
        cases.raise_fatal(problems, tmp_path / "report.csv")
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 4


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
