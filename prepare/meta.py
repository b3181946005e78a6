"""What every preparation does last."""
import hashlib
import json
from pathlib import Path


def save_meta(folder, meta):
    """SHA256SUMS of all arrays, which `train.py --checksum=True` and `sha256sum -c` compare; then meta.json, whose presence says
    that all is there."""
    folder, lines = Path(folder), []
    for path in sorted(folder.rglob('*.npy')):
        with open(path, 'rb') as file:
            lines.append(f'{hashlib.file_digest(file, "sha256").hexdigest()}  {path.relative_to(folder).as_posix()}\n')
    (folder / 'SHA256SUMS').write_text(''.join(lines))
    new = folder / 'meta.tmp'
    new.write_text(json.dumps(meta, indent=1))
    new.replace(folder / 'meta.json')  # at once: a folder to which something was added is never without
