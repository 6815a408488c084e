"""API keys: only their hashes are kept, and a list that is wrong is refused with its line."""

import pytest

from pipeline.serving.http.keys import KeyFileError, Keys, hashed, new_key


def test_a_key_is_known_by_its_hash():
    mine, yours = new_key(), new_key()
    assert mine != yours
    keys = Keys.parse(f"# who may render\nme:{hashed(mine)}\n\nteam:a:{hashed(yours)}  # the others\n")
    assert (keys.owner(mine), keys.owner(yours)) == ("me", "team:a")
    assert keys.owner(hashed(mine)) is None
    assert keys.owner("") is None


@pytest.mark.parametrize("line", ["me", "me:short", f":{'a' * 64}", f"me:{'G' * 64}"])
def test_a_wrong_line_is_named(line):
    with pytest.raises(KeyFileError, match="line 2"):
        Keys.parse(f"\n{line}")
