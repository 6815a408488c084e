from tests.requirements import lacking, packages


def test_what_is_lacking_is_named_with_its_install_line():
    assert lacking(["browser", "slow", "browser"], find=lambda _: None) == [
        "browser tests need chromium: apt-get install chromium"
    ]


def test_what_is_there_is_fine():
    assert lacking(["browser", "database"], find=lambda program: f"/usr/bin/{program}") == []


def test_unmarked_tests_need_nothing():
    assert lacking(["ray", "slow"], find=lambda _: None) == []


def test_packages_are_those_of_missing_programs():
    assert packages(find=lambda program: None if program == "chromium" else f"/usr/bin/{program}") == ["chromium"]
