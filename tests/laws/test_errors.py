"""What errors say."""

import os

import pytest
from megamm_laws.errors import InputError, RunError, error_text, exit_on_error


def test_errors_about_a_place_name_it_first_and_say_what_to_do(tmp_path):
    """Errors as the system raises them, of a file where a folder has to be and the other way round."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    calls = {
        "file": lambda: os.listdir(tmp_path / "file"),
        "file/below": lambda: (tmp_path / "file/below").write_text("x"),
        "folder": lambda: os.replace(tmp_path / "file", tmp_path / "folder"),
    }
    for place, call in calls.items():
        with pytest.raises(OSError) as caught:
            call()
        text = error_text(caught.value)
        assert text.startswith(f"{tmp_path / place}: ") and "move it away" in text and "Errno" not in text


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "none").read_text()
    assert error_text(caught.value) == str(caught.value)
    assert error_text(RunError("a: b")) == "a: b"


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("bad"), 2), (RunError("bad"), 1), (OSError(28, "full", "p"), 1)]
)
def test_commands_end_with_the_code_and_one_line(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_on_error(main)
    assert caught.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Errno" not in lines[0]
