import pytest

from pneumo import submission
from pneumo.errors import DataError
from pneumo.score import score_files


def test_rows_follow_the_sample(tmp_path):
    path = tmp_path / "runs" / "submission.csv"
    submission.write(path, {"a": "1 2", "b": "-1"}, ["b", "a"], 8)
    assert path.read_text() == "ImageId,EncodedPixels\nb,-1\na,1 2\n"
    assert submission.summary({"a": "1 2", "b": "-1"}, 8) == "2 images, 50.0% empty, median area of the others 2 px"


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"a": "-1"}, "no prediction for ids of the sample: 1, as b"),
        ({"a": "-1", "b": "-1", "z": "-1"}, "ids that the sample does not: 1, as z"),
        ({"a": "-1", "b": "01 2"}, "the code of b does not decode"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path, codes, message):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with pytest.raises(DataError, match=message):
        submission.write(path, codes, ["a", "b"], 8)
    assert path.read_text() == "old"


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
    assert result == {
        "cases": 5,
        "positives": 3,
        "dice": pytest.approx((1 + 0.5 + 0 + 1 + 0) / 5, abs=1e-15),
        "dice_positive": pytest.approx(0.5, abs=1e-15),
        "true_negative_rate": 0.5,
        "all_empty": 0.4,
    }


def test_an_id_without_truth_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no truth for 1 of 2 ids of .*, as b"):
        score(tmp_path, "a,-1\nb,-1\n", "a,-1\n")


def test_means_over_nothing(tmp_path):
    result = score(tmp_path, "a,-1\n", "a,-1\n")
    assert result["dice_positive"] is None
    assert result["true_negative_rate"] == result["dice"] == result["all_empty"] == 1
