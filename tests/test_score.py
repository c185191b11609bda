import time

import numpy as np
import pytest
from PIL import Image

from pneumo.data import rle
from pneumo.errors import DataError
from pneumo.score import score_files


def score(tmp_path, predicted: str, truth: str) -> dict:
    (tmp_path / "p.csv").write_text("ImageId,EncodedPixels\n" + predicted)
    (tmp_path / "t.csv").write_text("ImageId, EncodedPixels\n" + truth)
    return score_files(tmp_path / "p.csv", tmp_path / "t.csv", annotation_size=8)


def test_score_by_hand(tmp_path):
    result = score(
        tmp_path,
        "hit,0 4\nhalf,0 2\nfalse,5 1\nquiet,-1\nmiss,-1\n",
        "other,3 3\nquiet, -1\nmiss, 1 1\nfalse,-1\nhalf,0 2\nhalf,10 4\nhit,0 4\n",
    )
    assert (result["cases"], result["positives"]) == (5, 3)
    assert result["dice"] == pytest.approx((1 + 0.5 + 0 + 1 + 0) / 5, abs=1e-15)
    assert result["dice_positive"] == pytest.approx(0.5, abs=1e-15)
    assert result["true_negative_rate"] == result["specificity"] == 0.5
    assert result["sensitivity"] == pytest.approx(2 / 3)
    assert result["all_empty"] == 0.4
    for name in ("dice", "sensitivity", "specificity"):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high
    assert result["dice_positive_interval"] is None  # of three cases


def test_an_id_without_truth_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no truth for 1 of 2 ids of .*, as b\. A negative needs a row with -1 there"):
        score(tmp_path, "a,-1\nb,-1\n", "a,-1\n")
    files = tmp_path / "p.csv", tmp_path / "t.csv"
    assert score_files(*files, annotation_size=8, unmasked="empty")["cases"] == 2


def test_what_is_not_scored_or_united_is_said(tmp_path, capsys):
    result = score(tmp_path, "a,0 4\na,10 2\nb,-1\n", "a,0 4\nb,-1\nc,-1\nd,0 1\n")
    assert (result["cases"], result["dice"]) == (2, (2 * 4 / (4 + 6) + 1) / 2)
    said = capsys.readouterr().err
    assert "p.csv: 3 rows of 2 ids; several of one id were united" in said
    assert "p.csv: no row for 2 of 4 ids of" in said and "as c, d; they are not scored" in said
    score(tmp_path, "a,0 4\nb,-1\n", "a,0 4\nb,-1\n")
    assert capsys.readouterr().err == ""


def test_mask_pictures_are_a_truth(tmp_path):
    """Of another size, and one not square: padded and brought to the grid, as training masks are."""
    (tmp_path / "truth").mkdir()
    wide = np.zeros((32, 64), dtype=np.uint8)
    wide[:16, :16] = 255  # rows 16 to 31 of the square of 64, so rows 2 and 3 of the grid of 8
    for name, mask in (("wide", wide), ("none", np.zeros((32, 32), dtype=np.uint8)), ("other", wide)):
        Image.fromarray(mask).save(tmp_path / "truth" / f"{name}.png")
    (tmp_path / "p.csv").write_text("ImageId,EncodedPixels\nwide,2 2 6 2\nnone,-1\n")
    result = score_files(tmp_path / "p.csv", tmp_path / "truth", annotation_size=8)
    assert (result["cases"], result["positives"], result["dice"]) == (2, 1, 1)
    with pytest.raises(DataError, match=r"truth: a folder, not a file\. Expected: a CSV with columns ImageId"):
        score_files(tmp_path / "truth", tmp_path / "p.csv", annotation_size=8)


def test_means_over_nothing(tmp_path):
    result = score(tmp_path, "a,-1\n", "a,-1\n")
    assert result["dice_positive"] is None
    assert result["true_negative_rate"] == result["dice"] == result["all_empty"] == 1


def test_rows_in_any_order_and_any_spelling_of_nothing(tmp_path):
    result = score(tmp_path, "b,\nd,nan\na,0 4\nc,-1.0\n", "c, -1 \nb,-1\nd,\na,0 2\na,2 2\nz,9 9 9\n")
    assert (result["cases"], result["positives"], result["dice"]) == (4, 1, 1)


def test_a_bad_row_counts_only_if_its_id_is_scored(tmp_path):
    assert score(tmp_path, "a,-1\n", "a,-1\nz,1 2 3\n")["dice"] == 1
    with pytest.raises(DataError, match="3 numbers"):
        score(tmp_path, "a,-1\nz,-1\n", "a,-1\nz,1 2 3\n")


def test_patients_widen_the_interval(tmp_path):
    ids = [f"i{number}" for number in range(200)]
    predicted = "".join(f"{image_id},{'-1' if int(image_id[1:]) // 10 % 2 else '0 1'}\n" for image_id in ids)
    truth = "".join(f"{image_id},-1\n" for image_id in ids)
    (tmp_path / "patients.csv").write_text(
        "ImageId,patient_id\n" + "".join(f"{image_id},p{int(image_id[1:]) // 10}\n" for image_id in ids)
    )
    alone = score(tmp_path, predicted, truth)["dice_interval"]
    files = {"annotation_size": 8, "patients": tmp_path / "patients.csv"}
    together = score_files(tmp_path / "p.csv", tmp_path / "t.csv", **files)["dice_interval"]
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


@pytest.mark.slow
def test_a_whole_submission_equals_an_independent_computation(tmp_path):
    """1,372 ids at 1024 px, shuffled, in under 20 s; against masks painted pixel by pixel."""
    rng = np.random.default_rng(0)
    rows, truth, wanted = [], [], []
    for number in range(1372):
        masks = []
        for present in rng.random(2) < 0.3:
            mask = np.zeros((1024, 1024), dtype=bool)
            if present:
                for _ in range(rng.integers(1, 4)):
                    (y, x), (h, w) = rng.integers(0, 900, 2), rng.integers(5, 125, 2)
                    mask[y : y + h, x : x + w] = True
            masks.append(mask)
        predicted, true = masks
        total = int(predicted.sum()) + int(true.sum())
        wanted.append(2 * int((predicted & true).sum()) / total if total else 1.0)
        rows.append(f"id{number},{rle.encode(predicted) if predicted.any() else rng.choice(['-1', ' -1'])}")
        truth.append(f"id{number},{rle.encode(true) if true.any() else '-1'}")
    for name, lines in (("p", rows), ("t", [*truth, "other,5 5"])):
        rng.shuffle(lines)
        (tmp_path / f"{name}.csv").write_text("ImageId,EncodedPixels\n" + "\n".join(lines) + "\n")
    started = time.perf_counter()
    result = score_files(tmp_path / "p.csv", tmp_path / "t.csv", annotation_size=1024)
    assert time.perf_counter() - started < 20
    assert result["cases"] == 1372
    assert result["dice"] == pytest.approx(np.mean(wanted), abs=1e-9)


def test_a_bad_row_without_an_id_counts(tmp_path):
    """Whose it is nobody knows: with data.unmasked=empty its image would be taken for empty."""
    with pytest.raises(DataError, match=r"t.csv line 3: 3 fields, the header has 2"):
        score(tmp_path, "a,-1\nb,0 1\n", "a,-1\nb,0,1\n")
    files = tmp_path / "p.csv", tmp_path / "t.csv"
    with pytest.raises(DataError, match=r"t.csv line 3: 3 fields, the header has 2"):
        score_files(*files, annotation_size=8, unmasked="empty")


def test_a_patient_table_that_is_wrong_is_refused(tmp_path):
    (tmp_path / "patients.csv").write_text("ImageId,patient_id\na,1\na,2\n")
    score(tmp_path, "a,-1\nb,-1\n", "a,-1\nb,-1\n")
    files = tmp_path / "p.csv", tmp_path / "t.csv"
    with pytest.raises(DataError, match="another patient than in a row before"):
        score_files(*files, annotation_size=8, patients=tmp_path / "patients.csv")


def test_a_patient_table_of_other_images_is_refused(tmp_path, capsys):
    """Its intervals would be those of single images, far too narrow."""
    patients = tmp_path / "patients.csv"
    patients.write_text("ImageId,patient_id\na.dcm,1\nb.dcm,1\n")
    score(tmp_path, "a,-1\nb,-1\n", "a,-1\nb,-1\n")
    files = tmp_path / "p.csv", tmp_path / "t.csv"
    with pytest.raises(DataError, match=r"patients\.csv: none of its ids is one of .*p\.csv, which has a$"):
        score_files(*files, annotation_size=8, patients=patients)
    patients.write_text("ImageId,patient_id\na,1\n")
    score_files(*files, annotation_size=8, patients=patients)
    assert "patients.csv: 1 of 2 ids have no patient, as b" in capsys.readouterr().err


def test_what_is_taken_for_empty_is_said_beside_the_result(tmp_path, capsys):
    """Not on standard output, where --json writes."""
    (tmp_path / "p.csv").write_text("ImageId,EncodedPixels\na,NaN\nb,-1\n")
    (tmp_path / "t.csv").write_text("ImageId,EncodedPixels\na,NaN\n")
    assert score_files(tmp_path / "p.csv", tmp_path / "t.csv", annotation_size=8, unmasked="empty")["dice"] == 1
    said = capsys.readouterr()
    assert "no truth for 1 of 2 ids" in said.err and "taken for empty (data.unmasked)" in said.err and not said.out
