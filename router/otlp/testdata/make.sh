#!/usr/bin/env bash
# Certificates of tests, with their keys: of no use anywhere else. Valid from 2020 to 2120.
#
#   ca.pem       signed server.pem (of 127.0.0.1, and of no other name) and client.pem
#   other.pem    another authority, which signed neither
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cd "$work"

printf '%s\n' '[ca]' 'default_ca = x' '[x]' 'database = index' 'new_certs_dir = .' 'policy = p' \
    'default_md = sha256' 'rand_serial = yes' 'unique_subject = no' '[p]' 'commonName = supplied' \
    >config
touch index

# NAME and its extensions; the rest is how it is signed.
certificate() {
    openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$1.key"
    openssl req -new -key "$1.key" -subj "/CN=headrace test $1" -out "$1.csr"
    printf '%b' "$2" >extensions
    openssl ca -batch -notext -config config -in "$1.csr" -out "$1.pem" -extfile extensions \
        -startdate 20200101000000Z -enddate 21200101000000Z "${@:3}"
}

authority='subjectKeyIdentifier=hash\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n'
entity='authorityKeyIdentifier=keyid\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\n'
certificate ca "$authority" -selfsign -keyfile ca.key
certificate other "$authority" -selfsign -keyfile other.key
by_ca=(-cert ca.pem -keyfile ca.key)
certificate server "${entity}extendedKeyUsage=serverAuth\nsubjectAltName=IP:127.0.0.1\n" "${by_ca[@]}"
certificate client "${entity}extendedKeyUsage=clientAuth\n" "${by_ca[@]}"
install -m 644 ca.pem other.pem server.pem server.key client.pem client.key "$here"
