#!/usr/bin/env bash
# Makes .venv ready: system packages where they are missing, then Python packages. Does nothing when nothing changed.
# setup.sh --browser also installs Chromium and its driver, which only the dashboard's test needs.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
say() { printf '[setup] %s\n' "$*"; }

apt_install() { # apt_install PACKAGE...: with sudo where we are not root; a clear line where neither is possible
  say "installing system packages: $*"
  local run=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "setup: please install: $* (no root and no sudo here)" >&2; exit 1; }
    run=(sudo)
  fi
  "${run[@]}" apt-get update -qq || true # a stale list may still hold the packages
  "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

missing_libraries() { # the shared objects that headless rendering and OpenCV load at run time
  local present
  present=$(ldconfig -p 2>/dev/null || true)
  grep -q 'libEGL\.so\.1' <<<"$present" || echo libegl1
  grep -q 'libGL\.so\.1' <<<"$present" || echo libgl1
  grep -q 'libgthread-2\.0\.so\.0' <<<"$present" || { apt-cache show libglib2.0-0t64 >/dev/null 2>&1 && echo libglib2.0-0t64 || echo libglib2.0-0; }
  # Mesa's software rasteriser: one file per driver up to Mesa 24, one shared libgallium after it.
  compgen -G '/usr/lib/*/dri/swrast_dri.so' >/dev/null || compgen -G '/usr/lib/*/libgallium*.so' >/dev/null || echo libgl1-mesa-dri
}

install_browser() { # Debian has both; Ubuntu only has a snap, which containers cannot run: the test is then skipped
  if command -v chromedriver >/dev/null && { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then
    return
  fi
  if command -v apt-get >/dev/null; then
    [ -n "$(apt-cache pkgnames chromium-driver 2>/dev/null)" ] || { [ "$(id -u)" = 0 ] && apt-get update -qq || true; }
    if [ -n "$(apt-cache pkgnames chromium-driver 2>/dev/null)" ]; then
      apt_install chromium chromium-driver
      return
    fi
  fi
  say "no Chromium with its driver can be installed here: the dashboard's browser test is skipped"
}

[ "${1:-}" != --browser ] || install_browser

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: Python 3.10 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 1; }

extras="sim,train,data,ray,rerun,dev"
venv_flags=()
ros="PyPI wheels"
if [ -n "${ROS_DISTRO:-}" ] && "$python" -c 'import rclpy' 2>/dev/null; then
  ros="sourced ROS 2 $ROS_DISTRO"
  venv_flags=(--system-site-packages)
else
  extras="$extras,ros-wheels"
fi

wanted=$( { cat setup.py scripts/setup.sh scripts/constraints.txt; "$python" -V; echo "$ros"; } | sha256sum | cut -d' ' -f1)
if [ -f "$venv/.ready" ] && [ "$(cat "$venv/.ready")" = "$wanted" ]; then exit 0; fi

if command -v apt-get >/dev/null; then
  packages=$(missing_libraries)
  "$python" -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3-venv"
  # shellcheck disable=SC2086
  [ -z "${packages// /}" ] || apt_install $packages
fi

say "Python $("$python" -c 'import platform; print(platform.python_version())'), ROS 2 from: $ros"
[ -x "$venv/bin/python" ] || "$python" -m venv "${venv_flags[@]}" "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --upgrade 'pip>=24' 'setuptools>=68' wheel
torch=$(grep '^torch==' scripts/constraints.txt)
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  # torch goes first and pinned: anything looser may pull several GB of CUDA on a machine without a GPU.
  say "installing $torch"
  if command -v nvidia-smi >/dev/null || ! "${pip[@]}" install "$torch+cpu" 2>/dev/null; then
    "${pip[@]}" install "$torch"
  fi
fi
say "installing the package with extras [$extras]"
"${pip[@]}" install -c scripts/constraints.txt -e ".[$extras]"
echo "$wanted" >"$venv/.ready"
say "ready"
