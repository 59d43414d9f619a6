#!/usr/bin/env bash
# Installs what tests/test_browser.py opens reports with, from Debian's package, unless it is there already.  Needs
# root, or sudo without a password.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then
        exit 0
    fi
done
if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install chromium with the package manager of this system" >&2
    exit 1
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
    as_root=(sudo -n)
fi
export DEBIAN_FRONTEND=noninteractive
echo "installing chromium" >&2
"${as_root[@]}" apt-get -qq update
"${as_root[@]}" apt-get -qq install --yes --no-install-recommends chromium >/dev/null
