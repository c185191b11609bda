import pytest

from pneumo import submission
from pneumo.errors import DataError


@pytest.mark.fault("S1", "a sample in another order than the predictions")
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
@pytest.mark.fault("S2", "ids missing or left over, a code that does not decode: the file that was there stays")
def test_what_does_not_fit_is_not_written(tmp_path, codes, message):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with pytest.raises(DataError, match=message):
        submission.write(path, codes, ["a", "b"], 8)
    assert path.read_text() == "old"
