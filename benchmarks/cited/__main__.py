"""The command; see the package."""

import argparse

import benchmarks.cited
from benchmarks.cited import SENTENCES, TABLES, check, write


def main() -> None:
    """Parse the command line, check or write."""
    parser = argparse.ArgumentParser(
        description=benchmarks.cited.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the results' figures into the tables first")
    if parser.parse_args().write:
        print(f"{write()} cells written")
    problems = check()
    print("\n".join(problems) or f"{len(TABLES)} tables and {len(SENTENCES)} sentences are what their results say")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
