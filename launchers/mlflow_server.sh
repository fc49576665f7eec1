#!/usr/bin/env bash
# MLflow on a PostgreSQL of its own, until Ctrl-C: for a cluster, whose jobs write at the same time.
#
#   launchers/mlflow_server.sh
#
#   MLFLOW_SERVER_DIR   the database, artifacts and logs (default mlflow-server in the working directory)
#   MLFLOW_SERVER_HOST  address to listen on (default 127.0.0.1; MLflow asks nobody for a password)
#   MLFLOW_SERVER_PORT  default 5000
#   MLFLOW_SERVER_ALLOWED_HOSTS  names in tracking.uri that MLflow answers to (default: this machine's, private addresses)
#   PYTHON              with the extra `tracking` installed (default python)
# Runs take the server by tracking.uri=http://HOST:PORT or $MLFLOW_TRACKING_URI. PostgreSQL (Debian's package postgresql)
# listens on a socket in MLFLOW_SERVER_DIR alone; root runs it as the user postgres, because it refuses to be root's.
set -euo pipefail

DIR=${MLFLOW_SERVER_DIR:-$PWD/mlflow-server} HOST=${MLFLOW_SERVER_HOST:-127.0.0.1} PORT=${MLFLOW_SERVER_PORT:-5000}
PYTHON=${PYTHON:-python}

fail() { echo "mlflow_server: $*" >&2; exit 1; }

BIN=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1)
[ -x "$BIN/initdb" ] || fail "PostgreSQL not found: apt-get install -y postgresql"
"$PYTHON" -c 'import psycopg2' 2>/dev/null || fail "psycopg2 not found: pip install -e '.[tracking]'"

umask 077
mkdir -p "$DIR/files" "$DIR/database" "$DIR/socket"
DIR=$(cd "$DIR" && pwd)
owner() { "$@"; }
if [ "$(id -u)" = 0 ]; then
  owner() { runuser -u postgres -- "$@"; }
  chmod 711 "$DIR"
  chown postgres "$DIR/database" "$DIR/socket"
  owner test -x "$DIR/socket" || fail "the user postgres cannot get to $DIR: give another MLFLOW_SERVER_DIR"
fi

# Trust means whoever can open the socket, whose folder only the owner and root can enter.
[ -s "$DIR/database/PG_VERSION" ] ||
  owner "$BIN/initdb" -D "$DIR/database" -U mlflow --auth=trust --encoding=UTF8 --locale=C.UTF-8 >/dev/null
# pg_ctl would write its log as the owner, who may not be allowed to here.
(cd "$DIR/socket" && owner "$BIN/pg_ctl" -D "$DIR/database" -w -s -l "$DIR/socket/log" \
  -o "-c listen_addresses= -c unix_socket_directories='$DIR/socket' -c max_connections=200" start) ||
  fail "PostgreSQL does not start; see $DIR/socket/log"
server=
finish() {
  [ -z "$server" ] || { kill -TERM "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }
  (cd "$DIR/socket" && owner "$BIN/pg_ctl" -D "$DIR/database" -w -s -m fast stop)
}
trap finish EXIT
trap 'exit 0' INT TERM

psql() { owner "$BIN/psql" -h "$DIR/socket" -U mlflow -d postgres -tAqc "$1"; }
[ -n "$(psql "select 1 from pg_database where datname = 'mlflow'")" ] || psql 'create database mlflow'

echo "MLflow: http://$HOST:$PORT, with PostgreSQL in $DIR"
# MLflow alone would refuse the jobs of a cluster that call it by the name of this machine.
allowed="10.*,172.*,192.168.*"
for name in localhost 127.0.0.1 "$HOST" "$(hostname -s)" "$(hostname -f)"; do allowed+=",$name,$name:*"; done
export MLFLOW_SERVER_ALLOWED_HOSTS=${MLFLOW_SERVER_ALLOWED_HOSTS:-$allowed}
"$PYTHON" -m mlflow server --host "$HOST" --port "$PORT" --artifacts-destination "$DIR/files" \
  --backend-store-uri "postgresql+psycopg2://mlflow@/mlflow?host=$DIR/socket" &
server=$!
wait "$server"
