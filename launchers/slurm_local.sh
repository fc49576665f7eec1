#!/usr/bin/env bash
# A real SLURM on this one machine, in a folder of its own: munged, slurmctld and one slurmd per node, as root.
#
#   launchers/slurm_local.sh up | down [--purge] | status | env | stop-node NAME | start-node NAME
#
# `eval "$(launchers/slurm_local.sh env)"` makes sinfo, sbatch and bt find it. Nothing below /etc/slurm or /etc/munge is
# touched; the nodes' names go to /etc/hosts, because ranks on several nodes look each other up, and leave it on `down`.
# Partitions: `debug` (default), whose jobs are requeued when `high` needs their nodes. stop-node kills the slurmd of a
# node and all that runs on it, as a power cut would. (A node that is started again within a minute may kill its jobs'
# next attempts, when slurmctld repeats what it could not tell it.) Needs Debian's slurm-wlm and munge.
set -euo pipefail

DIR=${SLURM_LOCAL_DIR:-/run/slurm-local}   # everything is in here; nobody but root may be able to make it
NODES=${SLURM_LOCAL_NODES:-2}              # named n1, n2, ...
CPUS=${SLURM_LOCAL_CPUS:-4}                # each node claims; may be more than there are
MEMORY=${SLURM_LOCAL_MEMORY:-8000}         # MB each node claims
PORT=${SLURM_LOCAL_PORT:-27500}            # of slurmctld; the nodes take the next ones
GRACE=${SLURM_LOCAL_GRACE:-20}             # seconds between the signal of a preemption and the end
export SLURM_CONF=$DIR/slurm.conf PATH=$PATH:/usr/sbin:/sbin
MARK="# bt local SLURM in $DIR"

fail() { echo "slurm_local: $*" >&2; exit 1; }

# A daemon is remembered by process id and start time, so that a number used again is never mistaken for it.
born() { sed -n 's/^.*) //; /^Z/!p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; } # nothing for a dead one
running() {
  local pid start
  read -r pid start 2>/dev/null <"$DIR/run/$1.process" || return 1
  [ -n "$start" ] && [ "$(born "$pid" || true)" = "$start" ]
}
pid_of() { cut -d' ' -f1 "$DIR/run/$1.process"; }

daemon() { # NAME COMMAND...
  local name=$1 pid; shift
  running "$name" && return 0
  setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 &
  pid=$!
  sleep 0.2
  echo "$pid $(born $pid || true)" >"$DIR/run/$name.process"
}

end() { # NAME: asks, waits 10 s, then kills
  local i
  running "$1" || return 0
  kill -TERM "$(pid_of "$1")" 2>/dev/null || true
  for i in $(seq 100); do running "$1" || return 0; sleep 0.1; done
  kill -KILL "$(pid_of "$1")" 2>/dev/null || true
}

names() { seq -f 'n%.0f' "$NODES"; }

hosts() { # NODE ...: as this SLURM's only nodes. /etc/hosts may be a bind mount, which cannot be renamed over
  local rest n
  exec 9</etc/hosts
  flock 9
  rest=$(grep -vF "$MARK" /etc/hosts || true)
  { printf '%s\n' "$rest"; for n in "$@"; do echo "127.0.0.1 $n $MARK"; done; } >/etc/hosts
  exec 9<&-
}

configure() {
  local host; host=$(hostname -s)
  hosts $(names)
  cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for its credential to expire, 120 s by default.
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
# Without accounting: sacct does not answer, as on many small clusters.
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=1,preempt_send_user_signal
JobRequeue=1
KillWait=10
OverTimeLimit=0
MinJobAge=3600
SlurmdTimeout=20
ReturnToService=2
InactiveLimit=0
Waittime=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-$NODES] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + NODES))] CPUs=$CPUS RealMemory=$MEMORY State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=100 PreemptMode=OFF
CONF
}

ready() { [ "$(sinfo -h -N -p debug -t idle,mixed,allocated -o %N 2>/dev/null | wc -l)" = "$NODES" ]; }

up() {
  local program n i
  [ "$(id -u)" = 0 ] || fail "needs root"
  [ "$NODES" -ge 2 ] || fail "SLURM_LOCAL_NODES must be at least 2"
  for program in munged slurmctld slurmd sbatch; do
    command -v $program >/dev/null || fail "$program not found: apt-get install -y slurm-wlm munge"
  done
  umask 022
  mkdir -p "$DIR"/{run,log,state}
  mkdir -p -m 700 "$DIR/key"
  [ -s "$DIR/key/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$DIR/key/munge.key")
  running slurmctld || configure
  running munged || rm -f "$DIR/run/munge.socket" "$DIR/run/munge.socket.lock"
  daemon munged munged -F -f -S "$DIR/run/munge.socket" --key-file="$DIR/key/munge.key" \
    --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/key/munged.seed"
  for i in $(seq 50); do [ -S "$DIR/run/munge.socket" ] && break; sleep 0.1; done
  daemon slurmctld slurmctld -D -f "$SLURM_CONF"
  for n in $(names); do start_node "$n"; done
  for i in $(seq 120); do
    ready && { status; return 0; }
    for n in munged slurmctld $(names); do running "$n" || fail "$n does not start; see $DIR/log"; done
    sleep 0.5
  done
  fail "the nodes do not answer; see $DIR/log"
}

start_node() { mkdir -p "$DIR/spool.$1"; daemon "$1" slurmd -D -N "$1" -f "$SLURM_CONF"; }

stop_node() { # slurmd first, so that it reports nothing of the rest
  running "$1" || fail "$1 does not run"
  kill -KILL "$(pid_of "$1")"
  kill_steps "$1"
}

kill_steps() {
  local pid
  # What ran on the node: its step daemons, which write to its log, and processes whose environment names it.
  for pid in $(ls /proc | grep -E '^[0-9]+$'); do
    if ls -l "/proc/$pid/fd" 2>/dev/null | grep -qF "$DIR/log/slurmd.$1.log" || belongs "$pid" "$1"; then
      kill -KILL "$pid" 2>/dev/null || true
    fi
  done
}

belongs() { # PROCESS NODE
  local around; around=$({ tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null) || return 1
  grep -qxF "SLURMD_NODENAME=$2" <<<"$around" && grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$around"
}

down() {
  local n i
  [ -d "$DIR/run" ] || return 0
  if running slurmctld; then # the jobs first, so that nothing outlives the daemons
    for n in debug high; do timeout 10 scancel -p "$n" --state=PENDING,RUNNING,SUSPENDED 2>/dev/null || true; done
    for i in $(seq 60); do [ -z "$(timeout 5 squeue -h 2>/dev/null || true)" ] && break; sleep 0.5; done
  fi
  for n in $(names); do end "$n"; kill_steps "$n"; done
  end slurmctld
  end munged
  hosts
  [ "${1:-}" != --purge ] || rm -rf "$DIR"
}

status() {
  local n rc=0
  for n in munged slurmctld $(names); do
    if running "$n"; then echo "$n runs (process $(pid_of "$n"))"; else echo "$n is down"; rc=1; fi
  done
  [ $rc = 0 ] && sinfo && squeue
  return $rc
}

case "${1:-}" in
  up) up ;;
  down) down "${2:-}" ;;
  status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  start-node) start_node "$2" ;;
  stop-node) stop_node "$2" ;;
  *) sed -n '2,11p' "$0"; exit 2 ;;
esac
