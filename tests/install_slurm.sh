#!/usr/bin/env bash
# Installs what tests/test_slurm.py starts, from Debian's or Ubuntu's packages, unless it is there already: Slurm's
# controller, node daemon and clients, and shellcheck.  Starts no service.  Needs root, or sudo without a password.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

missing=()
command -v slurmctld >/dev/null || missing+=(slurmctld)
command -v slurmd >/dev/null || missing+=(slurmd)
command -v sbatch >/dev/null || missing+=(slurm-client)
command -v shellcheck >/dev/null || missing+=(shellcheck)
if [ ${#missing[@]} = 0 ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install ${missing[*]} with the package manager of this system" >&2
    exit 1
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
    as_root=(sudo -n)
fi
export DEBIAN_FRONTEND=noninteractive
echo "installing ${missing[*]}" >&2
"${as_root[@]}" apt-get -qq update
# The packages would start daemons under systemd; the tests start their own.
"${as_root[@]}" apt-get -qq install --yes --no-install-recommends "${missing[@]}" slurm-wlm-basic-plugins >/dev/null
