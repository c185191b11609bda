import csv
from pathlib import Path

import pytest

from pneumo.data.problems import Problem, counted, listed, raise_fatal, some
from pneumo.errors import DataError

TABLE = Path("train-rle.csv")


def test_it_says_where():
    problem = Problem.at(TABLE, "odd", row=7, image_id="a", field="EncodedPixels")
    assert problem == Problem("train-rle.csv", 7, "a", "train-rle.csv line 7, ImageId a, EncodedPixels: odd", True)
    problem = Problem.at(TABLE, "no rows", fatal=False)
    assert problem == Problem("train-rle.csv", None, "", "train-rle.csv: no rows", False)


def test_the_first_names_and_how_many_more():
    assert some("abcde") == "a, b, c, d, e"
    assert some(str(i) for i in range(1_205)) == "0, 1, 2, 3, 4 and 1,200 more"
    assert [counted(n, "row", "rows") for n in (0, 1, 1_204)] == ["0 rows", "1 row", "1,204 rows"]


def test_the_report_has_a_row_for_each(tmp_path):
    text, lines = "2 of 4 ids have no image", {"c": 4, "d": 5}
    missing = Problem.of_ids(TABLE, text, ["c", "d"], "no image", fatal=True, lines=lines)
    problems = [Problem.at(TABLE, "united", row=2, image_id="a", fatal=False), missing]
    report = tmp_path / "runs" / "data_report.csv"
    with pytest.raises(DataError, match=rf"^train-rle\.csv: 2 of 4 .*: c, d\. All are listed in {report}\.$"):
        raise_fatal(problems, report)
    with open(report, newline="") as file:
        rows = [(row["row"], row["image_id"], row["fatal"]) for row in csv.DictReader(file)]
    assert rows == [("2", "a", "false"), ("4", "c", "true"), ("5", "d", "true")]
    with pytest.raises(DataError, match=r"c, d\.$"):
        raise_fatal(problems, None)
    with pytest.raises(DataError, match=r"^train-rle\.csv line 2: x\. 2 more problems are there\.$"):
        raise_fatal([Problem.at(TABLE, "x.", row=2), *problems], None)
    raise_fatal(problems[:1], report)
    assert len(report.read_text().splitlines()) == 2


@pytest.mark.fault("P1", "12,000 masks of another size than their images, in folders of their own: 20 lines, and one")
def test_one_cause_for_all_images_is_not_told_of_each(tmp_path):
    def problem(number, text, fatal=True):
        image_id = f"ab{number:x}"
        path = f"{tmp_path}/masks/of {number}/{image_id}.png"
        return Problem(path, None, image_id, f"{path}, ImageId {image_id}: {text}", fatal)

    small = [
        problem(i, f"the mask is {i:,} x 9 pixels, its image /x/f{i:x}/ab{i:x}.png is 1,024 x 9") for i in range(12_000)
    ]
    others = [problem(7, "colours"), problem(7, 'token 7 is not whole: "x"'), problem(8, 'token 70 is not whole: "yz"')]
    notes = [problem(i, "colours", fatal=False) for i in range(21)]
    lines = listed([*small, *others, *notes], tmp_path / "report.csv")
    errors = [f"ERROR {one.message}" for one in [*small[:20], *others]]
    errors.insert(20, f"ERROR 11,980 more like this one; all are in {tmp_path / 'report.csv'}")
    assert lines[:24] == errors
    assert lines[24:44] == [f"note  {one.message}" for one in notes[:20]] and len(lines) == 45
    assert listed(small[:20], tmp_path) == errors[:20] and listed([], tmp_path) == []
