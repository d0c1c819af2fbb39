#!/bin/sh
# The store: objects by HTTP (nginx), and the snapshots' repository by git's own server behind it.
set -eu
umask 077
cd /var/lib/store
mkdir -p objects incoming
if [ ! -d snapshots.git ]; then
  git init --quiet --bare --initial-branch=main snapshots.new
  mv snapshots.new snapshots.git
fi
git -C snapshots.git config http.receivepack true
# Tags and notes stay what they are: nobody can take a snapshot or a checkpoint of the ledger back.
git -C snapshots.git config receive.denyNonFastForwards true
git -C snapshots.git config receive.denyDeletes true
rm -f /tmp/git.sock
fcgiwrap -f -c 4 -s unix:/tmp/git.sock &
exec nginx -c /etc/store/nginx.conf
