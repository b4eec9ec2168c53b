# Shared by the scripts: places, versions, and steps that say what they do and how long it took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REPO=$PWD
UV_VERSION=0.13.9
# Where everything is. Who wants a second, separate one on the same machine gives other places.
PREFIX=${SUPERCLOUD_PREFIX:-/opt/supercloud}
BIN=${SUPERCLOUD_BIN:-/usr/local/bin}
export UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_NO_PROGRESS=1 LC_ALL=C.UTF-8
export PATH="$PREFIX/bootstrap/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSTANCE=${SUPERCLOUD_INSTANCE:-default}
HOST_STATE=${SUPERCLOUD_HOST_STATE:-/var/lib/supercloud-host}/$INSTANCE
HOST_RUN=/run/supercloud-host
HOST_LISTEN=${SUPERCLOUD_HOST_LISTEN:-127.0.0.1:7443}
USER_NAME=${SUPERCLOUD_USER:-supercloud}
USER_STATE=${SUPERCLOUD_STATE:-/var/lib/supercloud}
RUN=${SUPERCLOUD_RUN:-/run/supercloud}
CONTROL_LISTEN=${SUPERCLOUD_LISTEN:-127.0.0.1:7444}
EXAMPLES=${SUPERCLOUD_EXAMPLES:-$REPO/build/examples}
LOGS=$USER_STATE/log
IMAGES=$USER_STATE/images

die() { printf 'error: %s\n' "$1" >&2; [ -z "${2:-}" ] || printf '  what to do: %s\n' "$2" >&2; exit 1; }

# step TEXT COMMAND...: run it quietly, show a moving mark meanwhile and the time after; its output on failure,
# which ends the script, or with KEEP_GOING sets FAILED.
FAILED=0
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
  [ $status = 0 ] || cat "$log" >&2
  rm -f "$log"
  [ $status = 0 ] || FAILED=$status
  [ $status = 0 ] || [ -n "${KEEP_GOING:-}" ] || exit $status
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

# as_user COMMAND...: as the unprivileged user, with an environment of its own.
as_user() {
  setpriv --reuid="$USER_NAME" --regid="$USER_NAME" --init-groups --no-new-privs -- \
    env -i PATH="$PATH" HOME="$USER_STATE" LC_ALL=C.UTF-8 SUPERCLOUD_SOCKET="$RUN/api.sock" \
    XDG_STATE_HOME="$USER_STATE" XDG_CACHE_HOME="$USER_STATE/cache" SUPERCLOUD_IMAGES="$IMAGES" "$@"
}

# wait_for SECONDS COMMAND...: repeat it until it succeeds.
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.1
  done
}

host() { "$PREFIX/current/bin/supercloud-host" "$@" --instance "$INSTANCE"; }
host_answers() { host status >/dev/null 2>&1; }

CONTROL_LOCK=$USER_STATE/state/lock
# The control plane holds a lock as long as it lives, on a file that has its process id.
control_runs() { [ -f "$CONTROL_LOCK" ] && ! flock --nonblock "$CONTROL_LOCK" true; }
control_answers() { as_user "$PREFIX/current/bin/supercloud" ls --quiet >/dev/null 2>&1; }
# The code that a process runs, as scripts/install names it.
code_of() { tr '\0' '\n' <"/proc/$1/cmdline" 2>/dev/null | head -n 1 | sed 's|/bin/[^/]*$||; s|.*/||'; }

start_control() {
  if control_runs && [ "$(code_of "$(cat "$CONTROL_LOCK")")" != "$(readlink "$PREFIX/current")" ]; then
    stop_control # it runs an older installation; platforms and environments do not mind
  fi
  control_runs ||
    (as_user setsid -f "$PREFIX/$(readlink "$PREFIX/current")/bin/python" -m supercloud.control.main \
      --state "$USER_STATE/state" --socket "$RUN/api.sock" --listen "$CONTROL_LISTEN" \
      </dev/null >>"$LOGS/control.out" 2>&1)
  wait_for 30 control_answers || { tail -n 20 "$LOGS/control.out"; return 1; }
}

# Whether a process is over; the lock of one is free a moment before.
has_ended() { ! grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$1/status"; }

stop_control() {
  control_runs || return 0
  local pid
  pid=$(cat "$CONTROL_LOCK")
  kill -TERM "$pid"
  flock --wait 30 "$CONTROL_LOCK" true && wait_for 10 has_ended "$pid" && return
  echo "process $pid does not end"
  return 1
}
