# Shared by the scripts: places, versions, and steps that say what they do and how long it took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REPO=$PWD
UV_VERSION=0.13.9
PREFIX=/opt/supercloud
export UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_NO_PROGRESS=1 LC_ALL=C.UTF-8
export PATH="$PREFIX/bootstrap/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSTANCE=${SUPERCLOUD_INSTANCE:-default}
HOST_STATE=/var/lib/supercloud-host/$INSTANCE
USER_STATE=/var/lib/supercloud
RUN=/run/supercloud
LOGS=$USER_STATE/log

die() { printf 'error: %s\n' "$1" >&2; [ -z "${2:-}" ] || printf '  what to do: %s\n' "$2" >&2; exit 1; }

# step TEXT COMMAND...: run it quietly, show a moving mark meanwhile and the time after; its output on failure.
step() {
  local text=$1 start=$EPOCHREALTIME log child status=0 marks='|/-\' i=0 now
  shift
  log=$(mktemp)
  "$@" >"$log" 2>&1 &
  child=$!
  if [ -t 1 ]; then
    while kill -0 "$child" 2>/dev/null; do
      now=$(tail -c 200 "$log" | tr '\r' '\n' | tail -n 1 | cut -c1-50)
      printf '\r\033[K%s %s  %s' "${marks:i++%4:1}" "$text" "$now"
      sleep 0.2
    done
    printf '\r\033[K'
  fi
  wait "$child" || status=$?
  printf '%s %-44s %6.1f s\n' "$([ $status = 0 ] && echo ✓ || echo ✗)" "$text" \
    "$(awk "BEGIN{print $EPOCHREALTIME-$start}")"
  [ $status = 0 ] || { cat "$log" >&2; rm -f "$log"; exit $status; }
  rm -f "$log"
}

need_root() { [ "$(id -u)" = 0 ] || die "$0 needs root" "run it with sudo"; }

# packages NAME...: Debian packages that are not there yet.
packages() {
  local missing=()
  for name in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
  done
  [ ${#missing[@]} = 0 ] && return
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

bootstrap_uv() {
  [ "$(uv --version 2>/dev/null | cut -d' ' -f2)" = "$UV_VERSION" ] && return
  [ -x "$PREFIX/bootstrap/bin/pip" ] || /usr/bin/python3 -m venv "$PREFIX/bootstrap"
  "$PREFIX/bootstrap/bin/pip" install --quiet "uv==$UV_VERSION"
}
