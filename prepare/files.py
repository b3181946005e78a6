"""
The files of a user's folder, and what is said of those that cannot be used.
"""


def visible(folder):
    """The files of a user's folder and its subfolders, sorted; not the hidden copies of editors and systems."""
    return sorted(path for path in folder.rglob('*') if path.is_file()
                  and not any(part.startswith(('.', '__MACOSX')) for part in path.relative_to(folder).parts))


def tell(faults, most=20):
    """Prints the first of a list of faults of a user's files, and the number of the others."""
    more = [f'and {len(faults) - most} more'] * (len(faults) > most)
    print(''.join(f'left out: {fault}\n' for fault in [*faults[:most], *more]), end='')
